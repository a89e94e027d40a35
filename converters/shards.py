"""Shards of a checkpoint whose tensors are read when they are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from edge_moe.converters.progress import Advance
from edge_moe.converters.safetensors_writer import TensorEntry, file_bytes, safetensors_file
from edge_moe.converters.staging import BuildFolder

SHARD_BYTES = 5 * 10**9


class ChunkedTensor(Protocol):
    """A tensor of an output file."""

    @property
    def entry(self) -> TensorEntry: ...

    def chunks(self) -> Iterable[bytes]:
        """The bytes to write."""


def write_shard(
    name: str,
    tensors: Sequence[ChunkedTensor],
    work: BuildFolder,
    advance: Advance = lambda num_bytes: None,
) -> None:
    """Write the file `name` into `work` and record it; one that is complete stays."""
    entries = [tensor.entry for tensor in tensors]
    if work.finished(name) is not None:
        advance(file_bytes(entries))
        return
    with safetensors_file(work.path / name, entries) as writer:
        for tensor in tensors:
            writer.write(tensor.entry.name, tensor.chunks())
            advance(tensor.entry.num_bytes)
    work.add(name)
