"""`make_delta`: what a fine-tuned model adds to its base, as a sparse ternary file.

Tensor by tensor; a killed run goes on behind the last finished layer.

.NAME.parts/
    lock, progress.json     as in `staging.BuildFolder`
    output/dense.bin, ...   packed segments, and beside them dense.npy: their tables
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_moe import __version__
from edge_moe.budget import num_weights
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.delta_checks import check_pair
from edge_moe.converters.delta_tensors import DeltaPart, delta_parts, shipped_dense
from edge_moe.converters.delta_writer import (
    DeltaDraft,
    PartTables,
    Scaling,
    load_tables,
    save_tables,
)
from edge_moe.converters.progress import Advance, byte_progress
from edge_moe.converters.sparsify import sparsify
from edge_moe.converters.staging import BuildFolder, locked
from edge_moe.delta_file import DeltaFile
from edge_moe.delta_info import DeltaInfo, DenseTensor
from edge_moe.delta_layout import num_segments
from edge_moe.errors import BudgetError, DiskSpaceError, EdgeMoeError, InputError
from edge_moe.files import atomic_path, require_file_output, require_free_disk
from edge_moe.package import is_package
from edge_moe.packed_tensors import PackedInfo
from edge_moe.sparse_signs import MOST_LENGTH, PACKING_BYTES, most_bytes

DEFAULT_DENSITY = 0.05
_TABLE_BYTES_PER_SEGMENT = 64  # on disk, twice, and headers
_SMALL_FILES_BYTES = 2**20
ALPHAS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
"""What is tried where text chooses."""
Score = Callable[[Path], float]
"""Loss of the base with a delta file, on text that chooses."""


@dataclass(frozen=True)
class DeltaReport:
    """What was written."""

    path: Path
    num_bytes: int
    entropy_bytes: float
    """Least bytes for as many signs at random places."""
    num_weights: int
    num_kept: int
    base_bytes: int
    """What the tuned model takes as it is stored."""
    explained: float
    """Share of ||tau||^2 that lies in the signs' direction, over all tensors: with scales of least
    squares 1 - ||tau - scale s||^2 / ||tau||^2."""
    scaling: Scaling

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.num_weights


def make_delta(
    base: Path,
    tuned: Path,
    output: Path,
    *,
    density: float = DEFAULT_DENSITY,
    scaling: Scaling | None = None,
    score: Score | None = None,
) -> DeltaReport:
    """Write the delta from `base` to `tuned`, two checkpoints of one architecture, to `output`.

    Without `scaling` signs and scale have the L1 norm of tau: what is kept stands for what is not.
    With `score` the least of its losses chooses between that and `ALPHAS`, in their order, up to
    the first that is worse.

    Memory: `peak_bytes`. Disk: three times the delta, at most.

    Raises:
        InputError: a density outside (0, 1], a scaling that means nothing, models without any
            difference, or an output that cannot be written.
        DeltaError: models of different architectures, with what differs.
        ValueError: both a scaling and a score.
        DiskSpaceError: too little space, before anything is written.
        CheckpointError: weights that are damaged, NaN or infinite.
    """
    if scaling is not None and score is not None:
        raise ValueError("a scaling that is given is not chosen")
    scaling = scaling or Scaling()
    scaling.check()
    if not 0 < density <= 1:
        raise InputError(f"--density is {density}: give a share of the weights, such as 0.05")
    require_file_output(output, ".delta")
    source, target = _open(base), _open(tuned)
    if source.folder.resolve() == target.folder.resolve():
        raise _no_difference(base, tuned)
    check_pair(source, target)
    info = _info(source, target, density)
    parts = list(delta_parts(source, target))
    needed_bytes = 3 * sum(_most_bytes(part, density) for part in parts) + _SMALL_FILES_BYTES
    require_free_disk(output.absolute().parent, needed_bytes, f"delta {output.name}")
    with _work_folder(output.absolute(), info) as work:
        total_bytes = sum(sum(part.num_weights) for part in parts)
        with byte_progress(f"delta {output.name}", total_bytes) as advance:
            for part in parts:
                _write_part(part, density, work, advance)
        tables = [load_tables(work, part) for part in parts]
        if not any(int(segments["kept"].sum()) for _, segments in tables):
            raise _no_difference(base, tuned)
        draft = DeltaDraft(info, parts, tables, work)
        if score is not None:
            scaling = _choose(draft, work.path / "tried.delta", score)
        draft.write(output.absolute(), scaling)
    return _report(output, tables, target, scaling)


def peak_bytes(base: Path) -> int:
    """Most memory that `make_delta` takes for weights: an expert of both models, a segment's work.

    Two packed dense tensors (fp8) where those are larger.
    """
    checkpoint = _open(base)
    packed = [info for info in checkpoint.dense_tensors if isinstance(info, PackedInfo)]
    largest = max((num_weights(info) for info in packed), default=0)
    held = max(checkpoint.spec.expert_weights, largest)
    return 3 * 4 * held + MOST_LENGTH * PACKING_BYTES


def _open(folder: Path) -> Checkpoint:
    if is_package(folder):
        raise InputError(
            f"{folder} is a package, whose experts may be rounded or gone: give the checkpoint "
            "that it was built from; its delta fits the package, too"
        )
    return Checkpoint(folder)


def _no_difference(base: Path, tuned: Path) -> InputError:
    return InputError(
        f"{base} and {tuned} hold the same weights, so there is no delta to ship: give the base "
        "and a model that was fine-tuned from it"
    )


def _info(base: Checkpoint, tuned: Checkpoint, density: float) -> DeltaInfo:
    spec = base.spec
    return DeltaInfo(
        edge_moe_version=__version__,
        base=base.folder.absolute().name,
        base_fingerprint=base.fingerprint,
        tuned=tuned.folder.absolute().name,
        tuned_fingerprint=tuned.fingerprint,
        density=density,
        scale_rule="l1",
        dense=tuple(DenseTensor(name=each.name, shape=each.shape) for each in shipped_dense(base)),
        moe_layer_ids=spec.moe_layer_ids,
        num_experts=spec.num_experts,
        expert_shapes=spec.expert_matrix_shapes,
    )


def _most_bytes(part: DeltaPart, density: float) -> int:
    """What a part takes on the disk at most."""
    total = 0
    for length in part.num_weights:
        num_kept = max(1, round(density * length))
        total += most_bytes(num_kept, length) + _TABLE_BYTES_PER_SEGMENT * num_segments(length)
    return total


@contextmanager
def _work_folder(output: Path, info: DeltaInfo) -> Iterator[BuildFolder]:
    """Stays where it is interrupted; is removed when the block ends well, or the input is wrong."""
    folder = output.with_name(f".{output.name}.parts")
    folder.mkdir(exist_ok=True)
    identity = hashlib.sha256(info.model_dump_json().encode()).hexdigest()
    busy = f"output {output} is being made by another process: wait for it to finish"
    with locked(folder / "lock", busy):
        work = BuildFolder(output, folder, identity)
        try:
            yield work
        except EdgeMoeError as error:
            if not isinstance(error, (BudgetError, DiskSpaceError)):
                shutil.rmtree(folder)
            raise
    shutil.rmtree(folder)


def _write_part(part: DeltaPart, density: float, work: BuildFolder, advance: Advance) -> None:
    name, tables = f"{part.name}.bin", f"{part.name}.npy"
    if work.finished(name) is not None and work.finished(tables) is not None:
        advance(sum(part.num_weights))
        return
    found = []
    with atomic_path(work.path / name) as temporary, temporary.open("wb") as handle:
        for new_pieces, length in zip(part.tensors, part.num_weights, strict=True):
            found.append(sparsify(new_pieces(), density, handle.write))
            advance(length)
    save_tables(work.path / tables, found)
    work.add(name)
    work.add(tables)


def _choose(draft: DeltaDraft, path: Path, score: Score) -> Scaling:
    """The best of `l1` and `ALPHAS`, each tried as the file at `path`."""
    chosen = Scaling()
    draft.write(path, chosen)
    best, last = score(path), float("inf")
    for alpha in ALPHAS:
        scaling = Scaling("alpha", alpha)
        draft.write(path, scaling)
        loss = score(path)
        if loss < best:
            best, chosen = loss, scaling
        if loss > last:
            break
        last = loss
    path.unlink()
    return chosen


def _report(
    output: Path,
    tables: Sequence[PartTables],
    tuned: Checkpoint,
    scaling: Scaling,
) -> DeltaReport:
    written = DeltaFile(output)  # reads its own header again
    square = sum(float(tensors["square"].sum()) for tensors, _ in tables)
    along = sum(_square_along(tensors) for tensors, _ in tables)
    loaded = [*shipped_dense(tuned), *(tuned.tensors[name] for name in tuned.expert_tensors)]
    return DeltaReport(
        path=output,
        num_bytes=written.num_bytes,
        entropy_bytes=written.entropy_bytes,
        num_weights=written.num_weights,
        num_kept=written.num_kept,
        base_bytes=sum(info.stored_bytes for info in loaded),
        explained=along / square,
        scaling=scaling,
    )


def _square_along(tensors: npt.NDArray[np.void]) -> float:
    """Sum over tensors of (tau s)^2 / ||s||^2."""
    return float((tensors["kept_magnitude"] ** 2 / np.maximum(tensors["num_kept"], 1)).sum())
