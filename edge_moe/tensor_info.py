"""Where one tensor of a checkpoint lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
