"""`upcycle --split`: a dense FFN becomes experts that are parts of it, and a router to choose them.

After MoEfication (arXiv 2110.01786), CMoE (arXiv 2502.04416) and Read-ME (arXiv 2410.19123): layer
by layer, the neurons that matter most on calibration text are always on, the others are clustered
by what fires together into experts of equal size, and a ridge regression from the FFN's input to
every expert's energy is the router. No weight changes: with all experts chosen, the MoE computes
what the dense model does, but for the bounded tilt of the router's weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from edge_moe import __version__
from edge_moe.converters.calibration_memory import state_and_require_memory
from edge_moe.converters.recover_teacher import TeacherCache, cache_bytes
from edge_moe.converters.recover_text import TrainText
from edge_moe.converters.sidecar import CARD_NAME
from edge_moe.converters.staging import build_folder
from edge_moe.converters.upcycle.dense_model import DenseModel, open_dense
from edge_moe.converters.upcycle.dense_stream import DenseStream
from edge_moe.converters.upcycle.split_layer import SplitLayer, split_layer
from edge_moe.converters.upcycle.split_layers import split_layers
from edge_moe.converters.upcycle.split_neurons import NeuronSplit
from edge_moe.converters.upcycle.split_router import bounded_rows, tilt_bound
from edge_moe.converters.upcycle.split_shape import split_shape
from edge_moe.converters.upcycle.split_student import (
    DistilSettings,
    SplitOnText,
    SplitStudent,
    trained_weights,
)
from edge_moe.converters.upcycle.target import MoeLayer, MoeShape, Target, choose_target
from edge_moe.converters.upcycle.train_text import dense_tokenizer, read_train_text
from edge_moe.converters.upcycle.write_moe import write_moe
from edge_moe.converters.window_training import LossRow, WindowTraining, windows_read
from edge_moe.errors import InputError
from edge_moe.files import atomic_path, require_free_disk, require_new_output, write_text
from edge_moe.measurement import Provenance
from edge_moe.plan import MemoryTerm
from edge_moe.runtime.evaluate import progress
from edge_moe.tasks import task_label, task_windows, windows_fingerprint

RECORD_NAME = "split.json"
_STATE_NAME = "distillation.safetensors"
_SAVE_SECONDS = 60.0
_ROUTER_SPREAD = 1.0  # any: rows are scaled by their bound afterwards
_CALIBRATION_WINDOWS = 64
_ALLOWANCE_BYTES = 100_000_000


class SplitSettings(BaseModel):
    """How a dense FFN is split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ridge: float = Field(default=0.01, ge=0)
    """Of the router, as a share of the inputs' mean square."""
    max_tilt: float = Field(default=1e-3, gt=0, lt=1)
    """How far any expert's weight may stray from that of equal scores, as a share of it."""
    seed: int = 0


class LayerRecord(BaseModel):
    """What came of one layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recall: float
    """Share of the top_k experts of most energy that the router finds, on the calibration text."""
    tilt_bound: float
    """See `split_router.tilt_bound`."""


class SplitRecord(BaseModel):
    """split.json: what was done."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provenance: Provenance
    source: str
    source_fingerprint: str
    architecture: str
    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int
    settings: SplitSettings
    data: list[str]
    num_tokens: int
    """Of calibration text."""
    layers: list[LayerRecord]
    distillation: DistilSettings
    losses: list[LossRow]
    """Of the distillation, on windows that only judged; step 0 is the split as it is."""
    kept_step: int
    memory_terms: list[MemoryTerm]
    total_bytes: int
    """All weight files."""


@dataclass(frozen=True)
class _Job:
    """One split: which model, into what, on which text."""

    dense: DenseModel
    target: Target
    shape: MoeShape
    settings: SplitSettings
    windows: Sequence[Sequence[int]]
    distil: DistilSettings
    text: TrainText | None
    keep_tied: bool


def split_dense(
    model: Path,
    data: Sequence[str],
    output: Path,
    *,
    num_experts: int = 16,
    top_k: int = 4,
    expert_width: int | None = None,
    settings: SplitSettings | None = None,
    distil: DistilSettings | None = None,
    window_tokens: int = 256,
    max_windows: int | None = None,
    keep_tied: bool = False,
) -> SplitRecord:
    """Write the dense checkpoint `model`, split into experts, to the new folder `output`.

    `data` are texts as tasks are named, of which at most `max_windows` are read, and 64 calibrated
    on. With steps to `distil`, the result then learns from the dense model. Memory is stated on
    stderr. A killed run goes on where it stopped when the same call is made again.

    Raises:
        InputError: a model, text, shape or output that cannot be used.
        BudgetError, DiskSpaceError: too little memory or disk, before the work begins.
        CheckpointError: damaged weights.
    """
    require_new_output(output)
    dense = open_dense(model)
    target = choose_target(dense.config)
    shape = split_shape(dense.config, target, num_experts, top_k, expert_width)
    limit = dense.config.max_position_embeddings
    if not 0 < window_tokens <= limit:
        raise InputError(
            f"windows of {window_tokens} tokens: use 1 to {limit}, the model's context"
        )
    most = min(_CALIBRATION_WINDOWS, max_windows or _CALIBRATION_WINDOWS)
    windows = task_windows(data, "calibration", dense_tokenizer(dense), window_tokens, most)
    distil = distil or DistilSettings()
    text = read_train_text(dense, data, window_tokens, max_windows) if distil.steps else None
    job = _Job(dense, target, shape, settings or SplitSettings(), windows, distil, text, keep_tied)
    phases = [split_terms(dense, shape, sum(map(len, windows)))]
    if distil.steps:
        phases.append(distil_terms(dense, shape, distil, window_tokens))
    terms = max(phases, key=lambda phase: sum(term.num_bytes for term in phase))
    state_and_require_memory(
        f"splitting {dense.config.num_layers} layers of {dense.config.ffn_width} neurons into "
        f"{shape.shared_width} always on and {num_experts} experts of {shape.expert_width}",
        terms,
    )
    with build_folder(output, _fingerprint(job)) as work:
        scratch = work.path.parent
        layers = _split_all(job, scratch)
        blocks, training = split_layers(dense, target, shape, layers), None
        if job.text is not None:
            student, training = _distil(job, job.text, blocks, scratch)
            dense, blocks = student.outside(dense), student.layers(dense, target, shape)
        total_bytes = write_moe(dense, target, shape, blocks, work, keep_tied=keep_tied)
        record = SplitRecord(
            provenance=Provenance.here(seed=job.settings.seed),
            source=dense.location.name,
            source_fingerprint=dense.fingerprint,
            architecture=target.architecture,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            expert_width=shape.expert_width,
            shared_width=shape.shared_width,
            settings=job.settings,
            data=[task_label(task) for task in data],
            num_tokens=sum(map(len, windows)),
            layers=[
                LayerRecord(
                    recall=layer.recall,
                    tilt_bound=tilt_bound(
                        torch.from_numpy(blocks[layer_id].router.read()),
                        _norm_weight(dense, layer_id),
                        is_softmax=target.is_softmax,
                    ),
                )
                for layer_id, layer in enumerate(layers)
            ],
            distillation=job.distil,
            losses=training.log if training else [],
            kept_step=training.best_row.step if training else 0,
            memory_terms=terms,
            total_bytes=total_bytes,
        )
        write_text(work.path / RECORD_NAME, record.model_dump_json(indent=1) + "\n")
        write_text(work.path / CARD_NAME, _card(record))
    return record


def split_terms(dense: DenseModel, shape: MoeShape, num_tokens: int) -> list[MemoryTerm]:
    """What splitting takes at most.

    T tokens, H hidden_size, F neurons, E experts, I their width, V vocabulary:

    embedding   4 V H, while the text is embedded
    one layer   16 x F H
    states      4 T x 3 H: hidden states, and what the FFN is given, while windows are joined
    neurons     4 T x 4 F: activations, strengths, and those in the order of experts, squared
    clusters    12 (E I)**2 for the assignment, and 4 x 4 x T / 3 x F for what fires
    """
    config = dense.config
    hidden, width = config.hidden_size, config.ffn_width
    clustered = shape.num_experts * shape.expert_width
    terms = {
        "embedding": 4 * config.vocab_size * hidden,
        "one layer": 16 * width * hidden,
        "states": 12 * num_tokens * hidden,
        "neurons": 16 * num_tokens * width,
        "clusters": 12 * clustered**2 + 6 * num_tokens * width,
        "allowance": _ALLOWANCE_BYTES,
    }
    return [
        MemoryTerm(name=name, num_bytes=count, source="formula") for name, count in terms.items()
    ]


def distil_terms(
    dense: DenseModel, shape: MoeShape, settings: DistilSettings, window_tokens: int
) -> list[MemoryTerm]:
    """What distillation takes at most; letters as in `split_terms`, L layers, N heads, W tokens.

    weights      4 bytes x every weight, an output matrix of its own included
    trained      4 bytes x 5 x every weight that learns: value, gradient, two moments, the best
    activations  4 W x (L (14 H + 4 Q + 8 F) + 8 V), Q the width of queries, and the attention's
                 scores, 12 L N W**2
    """
    config = dense.config
    weights = sum(math.prod(tensor.shape) for tensor in dense.tensors.values())
    weights += config.num_layers * (shape.num_experts + 1) * config.hidden_size
    weights += config.vocab_size * config.hidden_size if config.is_tied else 0
    queries = config.num_heads * config.head_width
    row = config.num_layers * (14 * config.hidden_size + 4 * queries + 8 * config.ffn_width)
    activations = 4 * window_tokens * (row + 8 * config.vocab_size)
    terms = {
        "weights": 4 * weights,
        "trained": 20 * trained_weights(dense, shape, settings.trains),
        "activations": activations + 12 * config.num_layers * config.num_heads * window_tokens**2,
        "allowance": _ALLOWANCE_BYTES,
    }
    return [
        MemoryTerm(name=name, num_bytes=count, source="formula") for name, count in terms.items()
    ]


def _distil(
    job: _Job, text: TrainText, blocks: Sequence[MoeLayer], scratch: Path
) -> tuple[SplitStudent, WindowTraining]:
    """The student in its best state. It is written out once as it is, and read as one model."""
    untrained = scratch / "untrained"
    if not untrained.exists():
        with build_folder(untrained, "split") as plain:
            write_moe(*(job.dense, job.target, job.shape, blocks, plain), keep_tied=job.keep_tied)
    student = SplitStudent(untrained, job.distil.trains)
    teacher = TeacherCache(scratch / "original")
    missing = teacher.missing(windows_read(text, job.distil))
    num_tokens = sum(len(text.windows[index]) for index in missing)
    require_free_disk(scratch, cache_bytes(num_tokens), "the dense model's predictions")
    with progress("the dense model predicts", len(missing)) as advance:
        teacher.fill(student, text.windows, advance, missing)  # nothing is learned yet
    training = WindowTraining(
        *(student.parameters, SplitOnText(student, text, teacher), text, job.distil),
        scratch / _STATE_NAME,
    )
    with progress("distilling", job.distil.steps - training.step) as advance:
        training.run(advance, save_seconds=_SAVE_SECONDS)
    return student, training


@torch.no_grad()
def _split_all(job: _Job, scratch: Path) -> list[SplitLayer]:
    """Layer after layer, on what the dense model gives it; those that are on disk are read."""
    stream = DenseStream(job.dense, job.target, job.shape)
    hidden, found = stream.embed(job.windows), []
    num_layers = job.dense.config.num_layers
    paths = [scratch / f"split_{layer_id:04}.safetensors" for layer_id in range(num_layers)]
    last = max((index for index, path in enumerate(paths) if not path.exists()), default=-1)
    with progress("splitting layers", num_layers) as advance:
        for layer_id, path in enumerate(paths):
            if layer_id <= last:
                _split_one(job, stream, layer_id, hidden, path)
            found.append(_load(path))
            advance()
    return found


def _split_one(
    job: _Job, stream: DenseStream, layer_id: int, hidden: list[torch.Tensor], path: Path
) -> None:
    settings, shape = job.settings, job.shape
    with stream.loaded(layer_id) as ffn:
        inputs = stream.ffn_inputs(layer_id, hidden)
        if path.exists():
            return
        layer = split_layer(
            ffn,
            inputs,
            ffn.activations(inputs),
            num_experts=shape.num_experts,
            expert_width=shape.expert_width,
            top_k=shape.top_k,
            ridge=settings.ridge,
            spread=_ROUTER_SPREAD,
            generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + layer_id),
        )
    rows = bounded_rows(
        layer.router,
        _norm_weight(job.dense, layer_id),
        settings.max_tilt,
        is_softmax=job.target.is_softmax,
    )
    tensors = {"shared": layer.split.shared, "experts": layer.split.experts, "router": rows}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"recall": repr(layer.recall)})


def _load(path: Path) -> SplitLayer:
    try:
        with safe_open(path, framework="pt") as handle:
            shared, experts, router = map(handle.get_tensor, ("shared", "experts", "router"))
            return SplitLayer(
                NeuronSplit(shared, experts), router, float(handle.metadata()["recall"])
            )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it and start again") from None


def _norm_weight(dense: DenseModel, layer_id: int) -> torch.Tensor:
    name = f"model.layers.{layer_id}.post_attention_layernorm.weight"
    return torch.from_numpy(dense.tensors[name].read())


def _fingerprint(job: _Job) -> str:
    """Equal for runs that may go on with one another's state."""
    parts = (
        __version__,
        job.dense.fingerprint,
        f"{job.shape} {job.keep_tied}",
        windows_fingerprint(job.windows),
        job.settings.model_dump_json(),
        job.distil.model_dump_json(),
        job.text.identity if job.text else "",
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _card(record: SplitRecord) -> str:
    """README.md of the folder."""
    recall = sum(layer.recall for layer in record.layers) / len(record.layers)
    tilt = max(layer.tilt_bound for layer in record.layers)
    first = record.losses[0] if record.losses else None
    kept = next((row for row in record.losses if row.step == record.kept_step), None)
    if first is None or kept is None:
        learned = (
            f"With num_experts_per_tok = {record.num_experts} it computes what the dense model "
            f"does, but for weights of experts that stray by at most {tilt:.2g} of themselves."
        )
    else:
        learned = (
            f"Distilled from the dense model for {record.distillation.steps} steps: divergence on "
            f"windows held out from training {first.heldout_divergence:.4f} -> "
            f"{kept.heldout_divergence:.4f} nats per token."
        )
    return f"""---
library_name: transformers
tags:
- edge-moe
---
# {record.architecture} split from {record.source}

The neurons of the dense model's feed-forward layers: {record.shared_width} per layer are always on,
{record.num_experts} experts have {record.expert_width} each, of which {record.top_k} are chosen
per token. Made with edge-moe {record.provenance.edge_moe_version} from {record.num_tokens} tokens
of {", ".join(record.data)}. Routers find {recall:.0%} of the experts that matter most on that text.
{learned}
`{RECORD_NAME}` has the settings and every layer.
"""
