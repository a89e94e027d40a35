"""`recover`: repair a shrunken package by training a few parameters against the original.

Routers first (`recover_router`), then low-rank branches on the attention outputs (`recover_train`),
both on calibration text of the task, of which every eighth document only judges. The result is a
package of its own. A killed run resumes when the same call is made again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_moe import __version__
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.calibration_memory import state_memory
from edge_moe.converters.recover_memory import (
    branch_terms,
    num_branch_weights,
    original_terms,
    require_memory,
    router_terms,
)
from edge_moe.converters.recover_router import RouterFit, calibrate_routers
from edge_moe.converters.recover_student import Branch, add_branches, load_student
from edge_moe.converters.recover_teacher import TeacherCache, cache_bytes
from edge_moe.converters.recover_text import TrainText, split_text
from edge_moe.converters.recover_train import BranchTraining, TrainSettings
from edge_moe.converters.recover_write import RECOVERY_NAME, write_recovered
from edge_moe.converters.staging import BuildFolder, build_folder
from edge_moe.converters.window_training import JudgedTraining, state_bytes
from edge_moe.errors import InputError, PackageError
from edge_moe.files import require_free_disk, require_new_output
from edge_moe.measurement import Provenance
from edge_moe.package import MANIFEST_NAME, Package
from edge_moe.plan import MemoryTerm
from edge_moe.runtime.evaluate import progress
from edge_moe.runtime.model import moe_blocks, verify_resident
from edge_moe.runtime.session import Session
from edge_moe.runtime.tokenizer import load_tokenizer
from edge_moe.tasks import task_label

WINDOW_TOKENS = 256


class RecoveryReport(JudgedTraining):
    """recovery.json of a recovered package: what was done, and what it did on held-out windows."""

    provenance: Provenance
    model_fingerprint: str
    tasks: list[str]
    window_tokens: int
    num_training_windows: int
    num_heldout_windows: int
    """Windows of the calibration text that only judged."""
    memory_phase: str
    memory_terms: list[MemoryTerm]
    """The most that was expected to be needed beside the libraries."""
    routers: list[RouterFit]
    """Empty where routers were left alone."""
    settings: TrainSettings | None
    """None where no branches were trained."""
    kept_step: int | None
    """The step whose branches were kept; 0 or None: there are none."""

    @property
    def has_gained(self) -> bool:
        """Whether a router or a branch was kept."""
        return bool(self.kept_step) or any(fit.is_kept for fit in self.routers)


@dataclass(frozen=True)
class _Job:
    """One recovery: what is repaired, against what, on which text."""

    package: Package
    original: Checkpoint
    text: TrainText
    settings: TrainSettings | None
    has_routers: bool
    memory: tuple[str, list[MemoryTerm]]


def recover(
    package: Path,
    against: Path,
    tasks: Sequence[str],
    output: Path,
    *,
    routers: bool = True,
    branches: bool = True,
    settings: TrainSettings | None = None,
    window_tokens: int = WINDOW_TOKENS,
    max_windows: int | None = None,
    max_memory_bytes: int | None = None,
) -> RecoveryReport:
    """Write a recovered copy of the native `package` to the new folder `output`.

    `against` is the checkpoint that the package was built from. Memory: `recover_memory`, refused
    above `max_memory_bytes` or what the machine has.

    Raises:
        InputError: another original, a package that was recovered already, too little text, nothing
            to do, or an output that exists.
        BudgetError: not enough memory.
        DiskSpaceError: not enough disk.
        PackageError, CheckpointError: damaged files.
    """
    require_new_output(output)
    if not (routers or branches):
        raise InputError("nothing to recover: leave the routers or the branches on")
    shrunken, original = Package(package), Checkpoint(against)
    _check_origin(shrunken, original)
    original.spec.require_plain_blocks("recovery")
    verify_resident(shrunken)
    limit = shrunken.spec.max_position_embeddings
    text = split_text(tasks, load_tokenizer(package), limit, window_tokens, max_windows)
    chosen = (settings or TrainSettings()) if branches else None
    job = _Job(
        package=shrunken,
        original=original,
        text=text,
        settings=chosen,
        has_routers=routers,
        memory=_state_memory(shrunken, original, text, chosen, routers, max_memory_bytes),
    )
    with build_folder(output, _fingerprint(job)) as work:
        return _recover(job, [task_label(task) for task in tasks], window_tokens, work)


def _recover(job: _Job, labels: list[str], window_tokens: int, work: BuildFolder) -> RecoveryReport:
    scratch = work.scratch
    rows, fits = _calibrate(job, scratch) if job.has_routers else ({}, [])
    training = _train(job, rows, scratch) if job.settings else None
    report = RecoveryReport(
        provenance=Provenance.here(),
        model_fingerprint=job.package.manifest.model_fingerprint,
        tasks=labels,
        window_tokens=window_tokens,
        num_training_windows=len(job.text.indices(True)),
        num_heldout_windows=len(job.text.indices(False)),
        memory_phase=job.memory[0],
        memory_terms=job.memory[1],
        routers=fits,
        settings=job.settings,
        losses=training[0].log if training else [],
        kept_step=training[0].best_row.step if training else None,
    )
    kept: dict[str, Branch] = training[1] if training and report.kept_step else {}
    text = report.model_dump_json(indent=1) + "\n"
    write_recovered(job.package, work.path, rows, kept, text, _card(report))
    return report


def _calibrate(job: _Job, scratch: Path) -> tuple[dict[int, Any], list[RouterFit]]:
    with progress("calibrating routers", job.package.spec.num_layers) as advance:
        return calibrate_routers(
            job.package,
            job.original,
            job.text.windows,
            job.text.is_training,
            scratch / "routers",
            advance,
        )


def _train(
    job: _Job, rows: dict[int, Any], scratch: Path
) -> tuple[BranchTraining, dict[str, Branch]]:
    if job.settings is None:
        raise ValueError("no settings to train with")
    windows = job.text.windows
    teacher = TeacherCache(scratch / "original")
    missing = teacher.missing(range(len(windows)))
    needed_bytes = cache_bytes(sum(len(windows[index]) for index in missing))
    needed_bytes += state_bytes(num_branch_weights(job.package, job.settings.rank))
    require_free_disk(scratch, needed_bytes, "the original's predictions and the training's state")
    if missing:
        with (
            Session.open(job.original.folder, context_tokens=max(map(len, windows))) as session,
            progress("the original predicts", len(missing)) as advance,
        ):
            teacher.fill(session, windows, advance)
    student = load_student(job.package)
    for layer_id, block in zip(
        job.package.spec.moe_layer_ids, moe_blocks(student, job.package.spec), strict=True
    ):
        if layer_id in rows:
            block.weight.copy_(rows[layer_id])
    branches = add_branches(student, job.settings.rank, job.settings.alpha, job.settings.seed)
    training = BranchTraining(student, branches, job.text, teacher, job.settings, scratch)
    with progress("training branches", job.settings.steps - training.step) as advance:
        training.run(advance)
    return training, branches


def _check_origin(package: Package, original: Checkpoint) -> None:
    if package.manifest.model_fingerprint != original.fingerprint:
        raise InputError(
            f"{package.folder} was built from a model with the fingerprint "
            f"{package.manifest.model_fingerprint[:12]}, {original.folder} has "
            f"{original.fingerprint[:12]}: give the checkpoint it was built from with --against"
        )
    if package.manifest.adapter is not None or (package.folder / RECOVERY_NAME).exists():
        raise InputError(
            f"{package.folder} was recovered already: recover the package it was made from"
        )


def _state_memory(
    package: Package,
    original: Checkpoint,
    text: TrainText,
    settings: TrainSettings | None,
    has_routers: bool,
    limit_bytes: int | None,
) -> tuple[str, list[MemoryTerm]]:
    """The largest phase's need, told on stderr."""
    num_tokens, longest = sum(map(len, text.windows)), max(map(len, text.windows))
    phases: dict[str, list[MemoryTerm]] = {}
    if has_routers:
        phases["routers"] = router_terms(original, package, num_tokens)
    if settings is not None:
        phases["original"] = original_terms(original)
        phases["branches"] = branch_terms(package, settings.rank, longest)
    name, terms = require_memory(phases, limit_bytes)
    subject = f"recovering on {num_tokens} tokens in {len(text.windows)} windows, "
    state_memory(f"{subject}{len(text.indices(False))} of them held out", terms, name)
    return name, terms


def _fingerprint(job: _Job) -> str:
    """Equal for runs that may go on with one another's state."""
    manifest = job.package.folder / MANIFEST_NAME
    try:
        digest = hashlib.sha256(manifest.read_bytes())
    except OSError as error:
        raise PackageError(f"{manifest} cannot be read ({error}): build again") from None
    settings = job.settings.model_dump_json() if job.settings else ""
    parts = (
        __version__,
        job.text.identity,
        settings,
        str(job.has_routers),
    )
    digest.update("\n".join(parts).encode())
    return digest.hexdigest()


def _card(report: RecoveryReport) -> str:
    """What the model card says about the recovery. Numbers are from calibration text held out."""
    lines = ["## Recovery", "", f"Repaired against the original on: {', '.join(report.tasks)}."]
    kept = [fit for fit in report.routers if fit.is_kept]
    if kept:
        lines.append(f"{len(kept)} of {len(report.routers)} routers were fitted anew.")
    first, last = report.row(0), report.row(report.kept_step)
    if report.settings and report.kept_step and first and last:
        lines.append(
            f"Branches of rank {report.settings.rank} on the attention outputs "
            f"(`adapter.safetensors`) are merged when the package is opened: divergence from the "
            f"original {first.heldout_divergence:.4f} -> {last.heldout_divergence:.4f} nats per "
            "token on calibration text held out from training."
        )
    lines.append(f"`{RECOVERY_NAME}` has the settings and the losses.")
    return "\n".join(lines) + "\n"
