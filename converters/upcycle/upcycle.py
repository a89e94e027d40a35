"""`upcycle`: a dense checkpoint gets routed experts that learn on top of it.

The dense feed-forward layer stays as the shared expert that every token uses. Routed experts start
as copies of it whose output is scaled by 0, so that the model is the dense one at first, and learn
from text: in full precision, or ternary (MoTE, arXiv:2506.14435). A killed run goes on when the
same call is made again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from edge_moe import __version__
from edge_moe.converters.calibration_memory import state_and_require_memory
from edge_moe.converters.recover_text import TrainText
from edge_moe.converters.sidecar import CARD_NAME
from edge_moe.converters.staging import BuildFolder, build_folder
from edge_moe.converters.upcycle.dense_model import DenseModel, open_dense
from edge_moe.converters.upcycle.learn import learn
from edge_moe.converters.upcycle.memory import student_terms, untrained_terms
from edge_moe.converters.upcycle.moe_modules import CPU
from edge_moe.converters.upcycle.record import (
    LOG_NAME,
    RECORD_NAME,
    UpcycleRecord,
    upcycle_card,
)
from edge_moe.converters.upcycle.student import Student, UpcycleSettings
from edge_moe.converters.upcycle.target import MoeShape, Target, choose_target
from edge_moe.converters.upcycle.train_text import dense_tokenizer, read_train_text
from edge_moe.converters.upcycle.trained_layers import (
    require_rows,
    routed_entry,
    ternary_forms,
    trained_layers,
    untrained_layers,
)
from edge_moe.converters.upcycle.write_moe import folder_bytes, write_moe
from edge_moe.errors import InputError
from edge_moe.files import require_new_output, write_text
from edge_moe.formats import expert_bytes
from edge_moe.measurement import Provenance
from edge_moe.plan import Device, MemoryTerm
from edge_moe.runtime.accelerator import accelerator_name
from edge_moe.tasks import task_label

_REMEDY = "use --checkpointing, a smaller --seq, fewer --experts, or a machine with more memory"


@dataclass(frozen=True)
class _Job:
    """One upcycling: which model, into what, on which text."""

    dense: DenseModel
    target: Target
    shape: MoeShape
    settings: UpcycleSettings
    text: TrainText | None
    window_tokens: int
    keep_tied: bool
    device: torch.device


def upcycle(
    model: Path,
    data: Sequence[str],
    output: Path,
    *,
    num_experts: int = 4,
    top_k: int = 1,
    settings: UpcycleSettings | None = None,
    window_tokens: int = 256,
    max_windows: int | None = None,
    keep_tied: bool = False,
    name: str | None = None,
    device: torch.device = CPU,
) -> UpcycleRecord:
    """Write the MoE made of the dense checkpoint `model` to the new folder `output`.

    `data` are texts as tasks are named. With no steps none is read or recorded, and the result
    computes what the dense model does. Memory of `device`, which trains: `memory.student_terms`,
    stated on stderr.

    Raises:
        InputError: a model, text, setting or output that cannot be used.
        BudgetError, DiskSpaceError: not enough memory or disk.
        SpecError, CheckpointError: damaged files.
    """
    require_new_output(output)
    chosen = settings or UpcycleSettings()
    dense = open_dense(model)
    width = dense.config.ffn_width
    if chosen.is_ternary:
        require_rows(dense.config.hidden_size, width, chosen.group)
    if chosen.steps and not data:
        raise InputError("no text is given: name at least one with --data, or use --steps 0")
    shape = MoeShape(num_experts, top_k, expert_width=width, shared_width=width)
    target = choose_target(dense.config)
    target.check(shape)
    text, trains_on = None, CPU
    if chosen.steps:
        trains_on = device
        tokenizer = dense_tokenizer(dense)
        text = read_train_text(dense, tokenizer, data, window_tokens, max_windows)
    job = _Job(dense, target, shape, chosen, text, window_tokens, keep_tied, trains_on)
    terms = untrained_terms(dense)
    if text is not None:
        terms = student_terms(dense, shape, chosen, window_tokens)
    memory_of: Device = "cuda" if trains_on.type == "cuda" else "cpu"
    state_and_require_memory(_subject(job), terms, _REMEDY, memory_of)
    with build_folder(output, _fingerprint(job)) as work:
        labels = [task_label(each) for each in data] if text is not None else []
        return _upcycle(job, work, terms, labels, name or str(model))


def _upcycle(
    job: _Job, work: BuildFolder, terms: list[MemoryTerm], labels: list[str], name: str
) -> UpcycleRecord:
    training = None
    if job.text is None:
        layers = untrained_layers(job.dense, job.shape, job.settings)
    else:
        student = Student(job.dense, job.target, job.shape, job.settings, job.device)
        training = learn(
            student,
            job.text,
            job.settings,
            work.scratch,
            "training experts",
            is_compared=bool(job.settings.kl_weight),
            output_bytes=_folder_bytes(job) - work.written_bytes(),
            log_path=work.path / LOG_NAME,
        )
        layers = trained_layers(student, job.dense, job.shape, job.settings)
    total_bytes = write_moe(job.dense, job.target, job.shape, layers, work, keep_tied=job.keep_tied)
    text = job.text or TrainText([], [])
    gpu = accelerator_name(job.device.type)
    record = UpcycleRecord(
        provenance=Provenance.here(seed=job.settings.seed, accelerator=gpu),
        source=name,
        source_fingerprint=job.dense.fingerprint,
        architecture=job.target.architecture,
        num_experts=job.shape.num_experts,
        top_k=job.shape.top_k,
        settings=job.settings,
        data=labels,
        window_tokens=job.window_tokens,
        num_training_windows=len(text.indices(True)),
        num_judging_windows=len(text.indices(False)),
        losses=training.log if training else [],
        kept_step=training.best_row.step if training else 0,
        memory_terms=terms,
        total_bytes=total_bytes,
        routed_bytes=_stored_bytes(job),
        packed_bytes={
            form: _packed_bytes(job, form)
            for form in (ternary_forms(job.settings.group) if job.settings.is_ternary else [])
        },
    )
    write_text(work.path / RECORD_NAME, record.model_dump_json(indent=1) + "\n")
    write_text(work.path / CARD_NAME, upcycle_card(record, job.dense.location, work.output.name))
    return record


def _folder_bytes(job: _Job) -> int:
    layers = untrained_layers(job.dense, job.shape, job.settings)
    return folder_bytes(job.dense, job.target, job.shape, layers, keep_tied=job.keep_tied)


def _subject(job: _Job) -> str:
    num_tokens = sum(map(len, job.text.windows)) if job.text else 0
    tied = ""
    if job.dense.config.is_tied and not job.keep_tied:
        copied = math.prod((job.dense.config.vocab_size, job.dense.config.hidden_size))
        tied = f", an output matrix of its own ({copied / 1e6:.1f} M weights; --tied leaves it out)"
    learned = f"{job.settings.steps} steps on {num_tokens} tokens" if job.text else "not trained"
    return (
        f"{job.target.architecture} of {job.shape.num_experts} experts beside the dense layer"
        f"{tied}, {learned}"
    )


def _stored_bytes(job: _Job) -> int:
    """Of routed experts in the folder."""
    layers = map(job.dense.ffn, range(job.dense.config.num_layers))
    matrices = [routed_entry(matrix, job.settings) for layer in layers for matrix in layer]
    return job.shape.num_experts * sum(entry.num_bytes for entry in matrices)


def _packed_bytes(job: _Job, form: str) -> int:
    """Of routed experts packed in `form`."""
    config, shape = job.dense.config, job.shape
    one = expert_bytes(form, config.hidden_size, shape.expert_width)
    return config.num_layers * shape.num_experts * one


def _fingerprint(job: _Job) -> str:
    """Equal for runs that may go on with one another's state."""
    parts = (
        __version__,
        job.dense.fingerprint,
        f"{job.shape} {job.keep_tied}",
        job.text.identity if job.text else "",
        job.settings.model_dump_json(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
