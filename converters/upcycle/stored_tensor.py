"""`StoredTensor`: one tensor of an output file, read only when it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from edge_moe.converters.safetensors_writer import TensorEntry
from edge_moe.converters.slicing import FORM_OF_DTYPE
from edge_moe.converters.source_bytes import read_chunks, read_float32
from edge_moe.errors import CheckpointError
from edge_moe.formats import get_form
from edge_moe.tensor_info import FloatArray, TensorInfo


@dataclass(frozen=True)
class StoredTensor:
    """A tensor by name, dtype and shape, and where its values come from."""

    entry: TensorEntry
    read: Callable[[], FloatArray]
    """All values as float32."""
    raw: Callable[[], Iterable[bytes]] | None = None
    """The stored bytes in chunks, where they need no conversion."""

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def dtype(self) -> str:
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def chunks(self) -> Iterable[bytes]:
        """The bytes to write. Memory: one chunk, or the tensor in float32 and in its dtype.

        Raises:
            CheckpointError: NaN, infinity, a value that its dtype cannot hold.
        """
        if self.raw is not None:
            yield from self.raw()
            return
        values = self.read()
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self.name} holds NaN or infinity: the training diverged, or the source is "
                "damaged; train with a lower --lr, or download it again"
            )
        rows = values.reshape(1, -1)
        yield get_form(FORM_OF_DTYPE[self.dtype]).pack(rows).tobytes()

    def named(self, name: str) -> StoredTensor:
        """The same values under another name."""
        return replace(self, entry=replace(self.entry, name=name))

    def scaled(self, factor: float) -> StoredTensor:
        """The values times `factor`, which is a power of two: no bit is lost."""
        if factor == 1.0:
            return self
        return StoredTensor(self.entry, lambda: self.read() * np.float32(factor))


def from_source(info: TensorInfo) -> StoredTensor:
    """A tensor of a safetensors file, its bytes as they are."""
    return StoredTensor(
        TensorEntry(info.name, info.dtype, info.shape),
        lambda: read_float32(info),
        lambda: read_chunks(info),
    )


def from_values(name: str, dtype: str, values: FloatArray) -> StoredTensor:
    """A tensor that is in memory; stored in `dtype`."""
    return StoredTensor(TensorEntry(name, dtype, values.shape), lambda: values)
