"""Where one tensor of a checkpoint lies, its bytes, and their values."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_moe.errors import CheckpointError

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a range of bytes in a file."""

    name: str
    path: Path
    dtype: str
    """safetensors spelling: BF16, F16, F32, ..."""
    shape: tuple[int, ...]
    offset: int
    """First byte, counted from the start of the file."""
    num_bytes: int

    @property
    def stored_bytes(self) -> int:
        """Bytes that it takes on disk."""
        return self.num_bytes

    def row(self, index: int) -> TensorInfo:
        """The range of `self[index]`; for tensors that are not packed."""
        row_bytes = self.num_bytes // self.shape[0]
        start = self.offset + index * row_bytes
        return TensorInfo(self.name, self.path, self.dtype, self.shape[1:], start, row_bytes)


def read_range(path: Path, offset: int, num_bytes: int) -> bytes:
    """Bytes of a file.

    Raises:
        CheckpointError: it ends before them.
    """
    pieces = []
    with path.open("rb") as handle:
        while num_bytes:
            piece = os.pread(handle.fileno(), num_bytes, offset)  # at most 2 GiB at a time
            if not piece:
                raise CheckpointError(
                    f"{path} ended early: it was truncated while being read; download it again"
                )
            pieces.append(piece)
            offset, num_bytes = offset + len(piece), num_bytes - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def to_float32(raw: bytes | bytearray | memoryview, dtype: str) -> FloatArray:
    """Flat float32 values of BF16, F16 or F32 bytes; BF16 is the upper half of a float32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return np.frombuffer(raw, dtype="<f2").astype(np.float32)
    return np.frombuffer(raw, dtype="<f4").astype(np.float32)
