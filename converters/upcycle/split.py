"""`upcycle --split`: a dense FFN becomes experts that are parts of it, and a router to choose them.

After MoEfication (arXiv 2110.01786), CMoE (arXiv 2502.04416) and Read-ME (arXiv 2410.19123): layer
by layer, the neurons that matter most on calibration text are always on, the others are clustered
by what fires together into experts of equal size, and a ridge regression from the FFN's input to
every expert's energy is the router. No weight changes: with all experts chosen, the MoE computes
what the dense model does, but for the bounded tilt of the router's weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from edge_moe import __version__
from edge_moe.converters.calibration_memory import state_and_require_memory
from edge_moe.converters.model_card import base_model
from edge_moe.converters.recover_memory import total_bytes
from edge_moe.converters.recover_text import TrainText
from edge_moe.converters.sidecar import CARD_NAME
from edge_moe.converters.staging import BuildFolder, build_folder
from edge_moe.converters.upcycle.dense_model import DenseModel, open_dense
from edge_moe.converters.upcycle.dense_stream import DenseStream
from edge_moe.converters.upcycle.learn import learn
from edge_moe.converters.upcycle.moe_modules import CPU
from edge_moe.converters.upcycle.split_layer import SplitLayer, split_layer
from edge_moe.converters.upcycle.split_layers import split_layers
from edge_moe.converters.upcycle.split_memory import (
    DISTIL_REMEDY,
    SPLIT_REMEDY,
    distil_terms,
    split_terms,
)
from edge_moe.converters.upcycle.split_neurons import NeuronSplit
from edge_moe.converters.upcycle.split_record import (
    RECORD_NAME,
    LayerRecord,
    SplitRecord,
    SplitSettings,
    split_card,
)
from edge_moe.converters.upcycle.split_router import bounded_rows, tilt_bound
from edge_moe.converters.upcycle.split_shape import split_shape
from edge_moe.converters.upcycle.split_student import DistilSettings, SplitStudent
from edge_moe.converters.upcycle.target import MoeLayer, MoeShape, Target, choose_target
from edge_moe.converters.upcycle.train_text import dense_tokenizer, read_train_text
from edge_moe.converters.upcycle.write_moe import folder_bytes, write_moe
from edge_moe.converters.window_training import WindowTraining
from edge_moe.errors import InputError
from edge_moe.files import atomic_path, require_free_disk, require_new_output, write_text
from edge_moe.measurement import Provenance
from edge_moe.plan import MemoryTerm
from edge_moe.runtime.accelerator import accelerator_name
from edge_moe.runtime.evaluate import progress
from edge_moe.tasks import MIN_WINDOW_TOKENS, task_label, task_windows, windows_fingerprint

_SCORE_SPREAD = 1.0  # any: rows are scaled by their bound afterwards
_CALIBRATION_WINDOWS = 64
_UNTRAINED = "untrained"


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
    device: torch.device
    """Where it learns again; the CPU where it does not."""

    @property
    def num_tokens(self) -> int:
        """Of calibration text."""
        return sum(map(len, self.windows))


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
    name: str | None = None,
    device: torch.device = CPU,
) -> SplitRecord:
    """Write the dense checkpoint `model`, split into experts, to the new folder `output`.

    `data` are texts as tasks are named, of which at most `max_windows` are read, and 64 calibrated
    on. With steps to `distil`, the result then learns from the dense model, on `device`. Memory is
    stated on stderr. `name` is how `model` was named, such as its hub id. A killed run goes on
    where it stopped when the same call is made again.

    Raises:
        InputError: a model, text, shape or output that cannot be used.
        BudgetError, DiskSpaceError: too little memory or disk, before the work begins.
        CheckpointError: damaged weights.
    """
    require_new_output(output)
    dense = open_dense(model)
    target = choose_target(dense.config)
    shape = split_shape(dense.config, target, num_experts, top_k, expert_width)
    _require_window(dense, window_tokens)
    tokenizer = dense_tokenizer(dense)
    most = min(_CALIBRATION_WINDOWS, max_windows or _CALIBRATION_WINDOWS)
    windows = task_windows(data, "calibration", tokenizer, window_tokens, most)
    distil, text, learns_on = distil or DistilSettings(), None, CPU
    if distil.steps:
        learns_on = device
        text = read_train_text(dense, tokenizer, data, window_tokens, max_windows)
    chosen = settings or SplitSettings()
    job = _Job(dense, target, shape, chosen, windows, distil, text, keep_tied, learns_on)
    terms = _state_memory(job, window_tokens)
    with build_folder(output, _fingerprint(job)) as work:
        source = base_model(name or str(model), dense.location)
        return _split(job, work, terms, [task_label(task) for task in data], source)


def _require_window(dense: DenseModel, window_tokens: int) -> None:
    limit = dense.config.max_position_embeddings
    if not MIN_WINDOW_TOKENS <= window_tokens <= limit:
        raise InputError(
            f"--seq is {window_tokens}: use {MIN_WINDOW_TOKENS} to {limit}, the model's context"
        )


def _state_memory(job: _Job, window_tokens: int) -> list[MemoryTerm]:
    """The need of the larger phase, stated and compared with what is there."""
    dense, shape = job.dense, job.shape
    phases = [(split_terms(dense, shape, job.num_tokens), SPLIT_REMEDY)]
    if job.distil.steps:
        learning = distil_terms(dense, shape, job.distil, window_tokens)
        if job.device.type == "cuda":
            state_and_require_memory("learning again", learning, DISTIL_REMEDY, "cuda")
            learning = [term for term in learning if term.name in ("weights", "allowance")]
        phases.append((learning, DISTIL_REMEDY))
    terms, remedy = max(phases, key=lambda phase: total_bytes(phase[0]))
    state_and_require_memory(
        f"splitting {dense.config.num_layers} layers of {dense.config.ffn_width} neurons into "
        f"{shape.shared_width} always on and {shape.num_experts} experts of {shape.expert_width}",
        terms,
        remedy,
    )
    return terms


def _split(
    job: _Job, work: BuildFolder, terms: list[MemoryTerm], labels: list[str], source: str
) -> SplitRecord:
    dense, target, shape, scratch = job.dense, job.target, job.shape, work.scratch
    _require_disk(job, work)
    layers = _split_all(job, scratch)
    blocks, training = split_layers(dense, target, shape, layers), None
    if job.text is not None:
        student, training = _distil(job, job.text, blocks, work)
        dense, blocks = student.outside(dense), student.layers(dense, target, shape)
    written_bytes = write_moe(dense, target, shape, blocks, work, keep_tied=job.keep_tied)
    gpu = accelerator_name(job.device.type)
    record = SplitRecord(
        provenance=Provenance.here(seed=job.settings.seed, accelerator=gpu),
        source=source,
        source_fingerprint=dense.fingerprint,
        architecture=target.architecture,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        expert_width=shape.expert_width,
        shared_width=shape.shared_width,
        settings=job.settings,
        data=labels,
        num_tokens=job.num_tokens,
        layers=_layer_records(dense, target, layers, blocks),
        distillation=job.distil,
        losses=training.log if training else [],
        kept_step=training.best_row.step if training else 0,
        memory_terms=terms,
        total_bytes=written_bytes,
    )
    write_text(work.path / RECORD_NAME, record.model_dump_json(indent=1) + "\n")
    write_text(work.path / CARD_NAME, split_card(record, dense.location, work.output.name))
    return record


def _require_disk(job: _Job, work: BuildFolder) -> None:
    """Before hours of work: room for the folder, and for another where one is learned from.

    Raises:
        DiskSpaceError: too little.
    """
    num_copies = 1 if job.text is None or (work.scratch / _UNTRAINED).exists() else 2
    begun = work.scratch.glob(f".{_UNTRAINED}.building/output/*")
    done_bytes = work.written_bytes() + sum(path.stat().st_size for path in begun)
    needed_bytes = max(0, num_copies * _folder_bytes(job) - done_bytes)
    require_free_disk(work.scratch, needed_bytes, "the split model")


def _folder_bytes(job: _Job) -> int:
    """Of layers whose neurons lie anywhere."""
    shape, zeros = job.shape, torch.zeros
    neurons = NeuronSplit(
        zeros(shape.shared_width, dtype=torch.long),
        zeros(shape.num_experts, shape.expert_width, dtype=torch.long),
    )
    layer = SplitLayer(neurons, zeros(shape.num_experts, job.dense.config.hidden_size), recall=0.0)
    layers = [layer] * job.dense.config.num_layers
    blocks = split_layers(job.dense, job.target, shape, layers)
    return folder_bytes(job.dense, job.target, shape, blocks, keep_tied=job.keep_tied)


def _layer_records(
    dense: DenseModel, target: Target, layers: Sequence[SplitLayer], blocks: Sequence[MoeLayer]
) -> list[LayerRecord]:
    """What the routers find, and how far those that are written may tilt."""
    tilts = [
        tilt_bound(
            torch.from_numpy(block.router.read()),
            _norm_weight(dense, layer_id),
            is_softmax=target.is_softmax,
        )
        for layer_id, block in enumerate(blocks)
    ]
    return [
        LayerRecord(recall=layer.recall, tilt_bound=tilt)
        for layer, tilt in zip(layers, tilts, strict=True)
    ]


def _distil(
    job: _Job, text: TrainText, blocks: Sequence[MoeLayer], work: BuildFolder
) -> tuple[SplitStudent, WindowTraining]:
    """The student in its best state. It is written out once as it is, and read as one model."""
    untrained = work.scratch / _UNTRAINED
    if not untrained.exists():
        with build_folder(untrained, "split") as plain:
            write_moe(*(job.dense, job.target, job.shape, blocks, plain), keep_tied=job.keep_tied)
    student = SplitStudent(untrained, job.distil.trains, job.device)
    training = learn(
        student,
        text,
        job.distil,
        work.scratch,
        "distilling",
        is_compared=True,
        output_bytes=_folder_bytes(job) - work.written_bytes(),
    )
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
            spread=_SCORE_SPREAD,
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
