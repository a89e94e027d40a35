"""Expert records in order: copied from the checkpoint, or packed ahead on every core."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.packer import Packer
from edge_moe.converters.slicing import DTYPE_OF_FORM
from edge_moe.converters.source_bytes import read_all
from edge_moe.measurement import usable_cores
from edge_moe.spec import ModelSpec

PACK_BYTES_PER_WEIGHT = 10
"""Peak memory of reading and packing one expert: float32, its source bytes, the packed ones."""
PACK_AHEAD_BYTES = 2**30
"""Experts are packed at the same time as long as they stay below this together."""


def num_workers(spec: ModelSpec) -> int:
    """Experts packed at the same time: one per core, fewer where experts are very large."""
    fitting = PACK_AHEAD_BYTES // (PACK_BYTES_PER_WEIGHT * spec.expert_weights)
    return max(1, min(usable_cores(), fitting))


def packing_peak_bytes(spec: ModelSpec) -> int:
    """Most memory that packing takes, whatever the number of experts or layers."""
    return num_workers(spec) * PACK_BYTES_PER_WEIGHT * spec.expert_weights


def expert_records(
    checkpoint: Checkpoint, layer_id: int, experts: Sequence[tuple[int, str]], packer: Packer
) -> Iterator[Iterable[bytes]]:
    """The record of every (expert_id, form) in order, each as chunks of bytes.

    Memory: `packing_peak_bytes`, or one chunk for an expert that is copied. numpy lets go of the
    interpreter's lock while it computes, so threads are enough to keep the cores busy.

    Raises:
        CheckpointError: NaN, infinity, or a file that ends early.
    """
    workers = num_workers(checkpoint.spec)
    waiting: deque[Iterable[bytes] | Future[bytes]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for expert_id, form in experts:
            if len(waiting) == workers:
                yield _chunks(waiting.popleft())
            if is_stored_as(form, checkpoint, layer_id, expert_id):
                waiting.append(read_all(checkpoint.expert_ranges(layer_id, expert_id)))
            else:
                waiting.append(pool.submit(_packed_record, packer, layer_id, expert_id, form))
        while waiting:
            yield _chunks(waiting.popleft())


def _packed_record(packer: Packer, layer_id: int, expert_id: int, form: str) -> bytes:
    """One expert, read and packed."""
    return packer.pack(layer_id, expert_id, form).tobytes()


def is_stored_as(form: str, checkpoint: Checkpoint, layer_id: int, expert_id: int) -> bool:
    """Whether the stored bytes, read in order, are those of `form` already."""
    dtypes = checkpoint.expert_dtypes(layer_id, expert_id)
    is_plain = all(dtype == DTYPE_OF_FORM.get(form) for dtype in dtypes)
    return is_plain and checkpoint.has_contiguous_experts


def _chunks(record: Iterable[bytes] | Future[bytes]) -> Iterable[bytes]:
    return [record.result()] if isinstance(record, Future) else record
