"""Writing safetensors files tensor by tensor: the header is known in advance, the data streams.

Layout: see `edge_moe.checkpoint`. The header JSON is padded with spaces so that the data starts at
a multiple of `alignment_bytes`; the library allows that, and it forbids holes between tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from edge_moe.errors import CheckpointError
from edge_moe.files import atomic_path, write_text
from edge_moe.safetensors_header import ITEMSIZE_BYTES

_PREFIX_BYTES = 8
_DEFAULT_ALIGNMENT_BYTES = 8  # what the safetensors library itself uses
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file that is about to be written."""

    name: str
    dtype: str
    """safetensors spelling: BF16, F16, F32, U8, ..."""
    shape: tuple[int, ...]

    @property
    def itemsize_bytes(self) -> int:
        """Bytes of one element.

        Raises:
            CheckpointError: a dtype that edge-moe does not know.
        """
        if self.dtype not in ITEMSIZE_BYTES:
            raise CheckpointError(
                f"tensor {self.name!r} has the dtype {self.dtype}; known are "
                f"{', '.join(ITEMSIZE_BYTES)}: give edge-moe the unquantised checkpoint"
            )
        return ITEMSIZE_BYTES[self.dtype]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize_bytes


def header(
    entries: Sequence[TensorEntry],
    alignment_bytes: int = _DEFAULT_ALIGNMENT_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Everything before the data, padded so that the data starts aligned.

    The metadata says `format: pt`, which transformers asks for, and what `metadata` adds.
    """
    described: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.num_bytes
        described[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(_PREFIX_BYTES + len(text)) % alignment_bytes)
    return struct.pack("<Q", len(text)) + text


def file_bytes(
    entries: Sequence[TensorEntry], alignment_bytes: int = _DEFAULT_ALIGNMENT_BYTES
) -> int:
    """Size of the whole file."""
    return len(header(entries, alignment_bytes)) + sum(entry.num_bytes for entry in entries)


class SafetensorsWriter:
    """Takes the tensors of one file in the order of its header. Memory: one chunk."""

    def __init__(
        self,
        handle: BinaryIO,
        entries: Sequence[TensorEntry],
        alignment_bytes: int = _DEFAULT_ALIGNMENT_BYTES,
        with_sha256: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._handle = handle
        self._remaining = list(reversed(entries))
        self._digest = hashlib.sha256() if with_sha256 else None
        self._put(header(entries, alignment_bytes, metadata))

    @property
    def sha256(self) -> str:
        """Digest of all bytes written so far, where `with_sha256` asked for it."""
        if self._digest is None:
            raise ValueError("this writer was not asked for a sha256")
        return self._digest.hexdigest()

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write the data of tensor `name`, the next one of the header.

        Raises:
            ValueError: another tensor is due, or the chunks have another size than the header says.
        """
        entry = self._remaining.pop() if self._remaining else None
        if entry is None or entry.name != name:
            raise ValueError(f"tensor {name!r} is written out of order, due is {entry}")
        num_bytes = 0
        for chunk in chunks:
            self._put(chunk)
            num_bytes += len(chunk)
        if num_bytes != entry.num_bytes:
            raise ValueError(f"{name!r} got {num_bytes} bytes, its header says {entry.num_bytes}")

    def check_complete(self) -> None:
        """Raise `ValueError` unless every tensor of the header was written."""
        if self._remaining:
            raise ValueError(f"tensor {self._remaining[-1].name!r} was never written")

    def _put(self, data: bytes) -> None:
        self._handle.write(data)
        if self._digest is not None:
            self._digest.update(data)


@contextmanager
def safetensors_file(
    path: Path,
    entries: Sequence[TensorEntry],
    alignment_bytes: int = _DEFAULT_ALIGNMENT_BYTES,
    with_sha256: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Iterator[SafetensorsWriter]:
    """Write `path` atomically: it appears complete when the block ends well, or not at all."""
    with atomic_path(path) as temporary:
        with temporary.open("wb") as handle:
            writer = SafetensorsWriter(handle, entries, alignment_bytes, with_sha256, metadata)
            yield writer
            writer.check_complete()


def split_into_shards(entries: Sequence[TensorEntry], shard_bytes: int) -> list[list[TensorEntry]]:
    """Consecutive runs of at most `shard_bytes` each; a larger tensor gets a shard of its own."""
    shards: list[list[TensorEntry]] = []
    room_bytes = 0
    for entry in entries:
        if not shards or entry.num_bytes > room_bytes:
            shards.append([])
            room_bytes = shard_bytes
        shards[-1].append(entry)
        room_bytes -= entry.num_bytes
    return shards


def shard_names(num_shards: int) -> list[str]:
    """File names as Hugging Face spells them."""
    if num_shards == 1:
        return [SINGLE_NAME]
    return [f"model-{i:05d}-of-{num_shards:05d}.safetensors" for i in range(1, num_shards + 1)]


def write_index(folder: Path, shards: Sequence[Sequence[TensorEntry]]) -> None:
    """Write `model.safetensors.index.json`; a single shard needs none."""
    if len(shards) == 1:
        return
    names = shard_names(len(shards))
    index = {
        "metadata": {"total_size": sum(entry.num_bytes for shard in shards for entry in shard)},
        "weight_map": {
            entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard
        },
    }
    write_text(folder / INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")
