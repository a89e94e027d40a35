"""Models told apart without reading them whole: a sample from the middle of every matrix.

One that was tuned in a few experts or routers alone is another model. A change of fewer weights
than a matrix has may go unseen.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from edge_moe.errors import CheckpointError

SAMPLE_BYTES = 256
_PIECE_BYTES = 2**24
"""Of a larger matrix every piece of so many bytes is sampled."""
_LEAST_SLICE_BYTES = 2**12
"""Slices of a stack that are smaller are no matrices, but taps of a convolution."""


class StoredRange(Protocol):
    """A tensor as a range of bytes in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def offset(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...


def sampled_digest(path: Path, data_start: int, tensors: Iterable[StoredRange]) -> bytes:
    """SHA-256 over the first `data_start` bytes of a file and samples of its `tensors`.

    Reads `SAMPLE_BYTES` per matrix: some 20,000 reads where 128 experts lie in each of 48 layers.

    Raises:
        CheckpointError: the file ends too early.
        OSError: it cannot be read.
    """
    ranges = sorted({place for info in tensors for place in _samples(info)})
    with path.open("rb") as handle:
        digest = hashlib.sha256(handle.read(data_start))
        if hasattr(os, "posix_fadvise"):  # nothing around the samples is worth reading
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for offset, num_bytes in ranges:
            sample = os.pread(handle.fileno(), num_bytes, offset)
            if len(sample) < num_bytes:
                raise CheckpointError(f"{path} ends before byte {offset}: download it again")
            digest.update(sample)
    return digest.digest()


def _samples(info: StoredRange) -> Iterable[tuple[int, int]]:
    """(first byte, bytes) of every sample."""
    num_pieces = -(-info.num_bytes // _PIECE_BYTES)
    if len(info.shape) > 2 and info.num_bytes >= info.shape[0] * _LEAST_SLICE_BYTES:
        num_pieces = max(num_pieces, info.shape[0])
    for index in range(num_pieces):
        start, end = (info.num_bytes * each // num_pieces for each in (index, index + 1))
        num_bytes = min(SAMPLE_BYTES, end - start)
        yield info.offset + (start + end - num_bytes) // 2, num_bytes
