"""The header of a GGUF file: metadata and tensor list, read and checked without the weights.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: "GGUF", version
u32, tensor count u64, key count u64; keys (string, type u32, value); tensors (name, axis count u32,
axes u64 fastest first, type u32, offset u64); padding to `general.alignment`; data. A string is a
u64 length and UTF-8 bytes, an array a type u32, a count u64 and the items.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import NamedTuple

from edge_moe.errors import CheckpointError
from edge_moe.formats.ggml_types import GGML_TYPES

Scalar = int | float | bool | str

# value type -> struct code; 8 is a string, 9 an array
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
# first part of a tensor name that matches -> component
_COMPONENTS = (
    ("_exps", "routed experts"),
    ("_shexp", "shared experts"),
    ("ffn_gate_inp", "routers"),
    ("exp_probs_b", "routers"),
    ("token_embd", "embeddings"),
    ("output.", "embeddings"),
    ("norm", "norms"),
    ("attn", "attention"),
    ("ffn", "dense MLPs"),
)
DEFAULT_ALIGNMENT = 32
_MAX_AXES = 4
_MAX_NUMBERS = 4096
"""Longest array of numbers that is read whole: one per layer, of which llama.cpp allows 512."""
_MAX_NESTING = 4
_MAX_STRING_BYTES = 2**26
_KEPT_ITEMS = 8
_MIN_KEY_BYTES = 13
"""Length, type and one byte of value: bounds the count that a file of a size can hold."""
_MIN_TENSOR_BYTES = 24


@dataclass(frozen=True)
class GgufArray:
    """A metadata array: its length and first items, which is all a report needs."""

    count: int
    first: tuple[Scalar | GgufArray, ...]


Value = Scalar | GgufArray


class Span(NamedTuple):
    """A range of bytes in a file."""

    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufTensorInfo:
    """One tensor of the list."""

    path: Path
    """The file that holds it."""
    name: str
    shape: tuple[int, ...]
    """Slowest axis first, as numpy prints it; the file stores the reverse."""
    type_name: str
    offset: int
    """First byte, counted from the start of the file."""
    num_bytes: int

    @property
    def component(self) -> str:
        """What it belongs to: routed experts, routers, attention, ..."""
        for part, component in _COMPONENTS:
            if part in self.name:
                return component
        return "other"


@dataclass(frozen=True)
class GgufHeader:
    """Everything in front of the weights."""

    path: Path
    version: int
    architecture: str
    """Empty in the later parts of a split model, which name none."""
    metadata: dict[str, Value]
    key_spans: dict[str, Span]
    """Where each key lies in the file, from the length of its name to the end of its value."""
    tensors: tuple[GgufTensorInfo, ...]
    data_start: int
    """First byte behind the header and its padding."""
    total_bytes: int
    """Size of the file."""

    @property
    def alignment(self) -> int:
        """Tensors start at multiples of this."""
        value = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        return value if isinstance(value, int) else DEFAULT_ALIGNMENT

    def number(self, key: str) -> int | None:
        """Metadata `{architecture}.{key}` as an int; None when absent or not one."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def numbers(self, key: str) -> tuple[int | float, ...] | None:
        """All numbers under `{architecture}.{key}`, one or an array; None when absent.

        `metadata` keeps only the first items of an array: a long one is read again.

        Raises:
            CheckpointError: the value holds something else than numbers.
        """
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name)
        if isinstance(value, GgufArray):
            items = value.first if value.count == len(value.first) else self._reread(name, value)
        else:
            items = () if value is None else (value,)
        if any(isinstance(item, str | GgufArray) for item in items):
            raise CheckpointError(
                f"{self.path}: the key {name!r} does not hold numbers; "
                "download or export the file again"
            )
        return tuple(item for item in items if isinstance(item, int | float)) or None

    def _reread(self, name: str, value: GgufArray) -> tuple[Value, ...]:
        if value.count > _MAX_NUMBERS:
            raise CheckpointError(
                f"{self.path}: the key {name!r} holds {value.count} numbers, at most "
                f"{_MAX_NUMBERS} make sense; download or export the file again"
            )
        with self.path.open("rb") as handle:
            reader = _Reader(handle, self.path, self.total_bytes, kept_items=_MAX_NUMBERS)
            reader.skip(self.key_spans[name].offset)
            reader.string()
            found = reader.value(reader.u32())
        return found.first if isinstance(found, GgufArray) else ()

    def raw_key(self, key: str) -> bytes:
        """The bytes of a key and its value, as they stand in the file."""
        span = self.key_spans[key]
        with self.path.open("rb") as handle:
            handle.seek(span.offset)
            return handle.read(span.num_bytes)


def summed_bytes(
    tensors: Iterable[GgufTensorInfo], group: Callable[[GgufTensorInfo], str]
) -> dict[str, int]:
    """Group -> bytes of its tensors, largest first."""
    sums: Counter[str] = Counter()
    for info in tensors:
        sums[group(info)] += info.num_bytes
    return dict(sums.most_common())


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of one GGUF file. Memory: the header without its long arrays.

    Raises:
        CheckpointError: missing, not GGUF, truncated, or a header that contradicts itself.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as handle:
            return _read(_Reader(handle, path, file_bytes))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


class _Reader:
    """Typed reads that never ask for more than the file still holds."""

    def __init__(
        self,
        handle: BufferedReader,
        path: Path,
        file_bytes: int,
        kept_items: int = _KEPT_ITEMS,
    ) -> None:
        self._handle = handle
        self.path = path
        self.file_bytes = file_bytes
        self._kept_items = kept_items

    @property
    def remaining_bytes(self) -> int:
        return self.file_bytes - self._handle.tell()

    @property
    def position(self) -> int:
        return self._handle.tell()

    def fail(self, problem: str) -> CheckpointError:
        """The error to raise."""
        return CheckpointError(f"{self.path}: {problem}; download or export the file again")

    def take(self, num_bytes: int) -> bytes:
        self._require(num_bytes)
        return self._handle.read(num_bytes)

    def skip(self, num_bytes: int) -> None:
        self._require(num_bytes)
        self._handle.seek(num_bytes, os.SEEK_CUR)

    def _require(self, num_bytes: int) -> None:
        remaining_bytes = self.remaining_bytes
        if num_bytes > remaining_bytes:
            raise self.fail(
                f"truncated: byte {self.position} needs {num_bytes} more bytes, "
                f"{remaining_bytes} are left"
            )

    def _skip_strings(self, count: int) -> None:
        """Walk over `count` strings: a vocabulary has hundreds of thousands."""
        handle, at = self._handle, self._handle.tell()
        for _ in range(count):
            raw = handle.read(8)
            at += 8 + int.from_bytes(raw, "little")
            if len(raw) < 8 or at > self.file_bytes:
                raise self.fail(f"truncated: a string that should end at byte {at}")
            handle.seek(at)

    def scalar(self, code: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(code, self.take(struct.calcsize(code)))[0]
        return value

    def u32(self) -> int:
        return int(self.scalar("<I"))

    def u64(self) -> int:
        return int(self.scalar("<Q"))

    def count(self, what: str, min_bytes: int) -> int:
        """A u64 count of things that take at least `min_bytes` each."""
        count = self.u64()
        if count * min_bytes > self.remaining_bytes:
            raise self.fail(f"{count} {what} do not fit in {self.remaining_bytes} bytes")
        return count

    def string(self) -> str:
        length = self.u64()
        if length > _MAX_STRING_BYTES:
            raise self.fail(f"a string of {length} bytes at byte {self.position}")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"the string before byte {self.position} is not UTF-8") from None

    def value(self, kind: int, nesting: int = 0) -> Value:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and nesting < _MAX_NESTING:
            return self._array(nesting + 1)
        raise self.fail(f"unknown value type {kind} at byte {self.position}")

    def _array(self, nesting: int) -> GgufArray:
        """Keeps the first items; walks over the others, or jumps where their size is fixed."""
        kind = self.u32()
        item_bytes = struct.calcsize(_SCALARS[kind]) if kind in _SCALARS else 8
        count = self.count("array items", item_bytes)
        kept = min(count, self._kept_items)
        first = tuple(self.value(kind, nesting) for _ in range(kept))
        if kind in _SCALARS:
            self.skip((count - kept) * item_bytes)
        elif kind == _STRING:
            self._skip_strings(count - kept)
        else:
            for _ in range(count - kept):
                self.value(kind, nesting)
        return GgufArray(count, first)


def _read(reader: _Reader) -> GgufHeader:
    if reader.remaining_bytes < 4 or reader.take(4) != b"GGUF":
        raise CheckpointError(f"{reader.path} is not a GGUF file: it does not start with 'GGUF'")
    version = reader.u32()
    if version not in (2, 3):
        raise CheckpointError(
            f"{reader.path}: GGUF version {version} is not supported; "
            "versions 2 and 3, little-endian, are"
        )
    num_tensors = reader.count("tensors", _MIN_TENSOR_BYTES)
    metadata, key_spans = _read_metadata(reader, reader.count("metadata keys", _MIN_KEY_BYTES))
    entries = [_read_entry(reader) for _ in range(num_tensors)]
    alignment = _alignment(reader, metadata)
    data_start = -(-reader.position // alignment) * alignment
    return GgufHeader(
        path=reader.path,
        version=version,
        architecture=_architecture(reader, metadata),
        metadata=metadata,
        key_spans=key_spans,
        tensors=_place(reader, entries, alignment, data_start),
        data_start=data_start,
        total_bytes=reader.file_bytes,
    )


def _read_metadata(reader: _Reader, num_keys: int) -> tuple[dict[str, Value], dict[str, Span]]:
    metadata: dict[str, Value] = {}
    spans: dict[str, Span] = {}
    for _ in range(num_keys):
        start = reader.position
        key = reader.string()
        if key in metadata:
            raise reader.fail(f"the key {key!r} appears twice")
        metadata[key] = reader.value(reader.u32())
        spans[key] = Span(start, reader.position - start)
    return metadata, spans


def _architecture(reader: _Reader, metadata: dict[str, Value]) -> str:
    """Only the first part of a split model has to name it."""
    part = metadata.get("split.no", 0)
    found = metadata.get("general.architecture", "" if isinstance(part, int) and part > 0 else None)
    if not isinstance(found, str):
        raise reader.fail("the key general.architecture is missing or not a string")
    return found


def _alignment(reader: _Reader, metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise reader.fail(f"general.alignment is {alignment!r}, not a power of two")
    return alignment


def _read_entry(reader: _Reader) -> GgufTensorInfo:
    """One tensor; its offset still counts from the start of the data."""
    name = reader.string()
    num_axes = reader.u32()
    if num_axes > _MAX_AXES:
        raise reader.fail(f"tensor {name!r} has {num_axes} axes, at most {_MAX_AXES} are allowed")
    axes = [reader.u64() for _ in range(num_axes)]
    kind = reader.u32()
    found = GGML_TYPES.get(kind)
    if found is None:
        raise CheckpointError(
            f"{reader.path}: tensor {name!r} has the ggml type {kind}, which this edge-moe does "
            "not know"
        )
    if axes and axes[0] % found.block_size:
        raise reader.fail(
            f"tensor {name!r} has rows of {axes[0]}, no multiple of {found.name}'s "
            f"{found.block_size}"
        )
    num_bytes = prod(axes) // found.block_size * found.block_bytes
    shape = tuple(reversed(axes))
    return GgufTensorInfo(reader.path, name, shape, found.name, reader.u64(), num_bytes)


def _place(
    reader: _Reader, entries: list[GgufTensorInfo], alignment: int, data_start: int
) -> tuple[GgufTensorInfo, ...]:
    """Entries with offsets from the start of the file, checked against its size and each other."""
    placed: dict[str, GgufTensorInfo] = {}
    end = 0
    for entry in sorted(entries, key=lambda info: info.offset):
        if entry.name in placed:
            raise reader.fail(f"the tensor {entry.name!r} appears twice")
        if entry.offset % alignment or entry.offset < end:
            raise reader.fail(
                f"tensor {entry.name!r} starts at {entry.offset}, which is not a multiple of "
                f"{alignment} or inside another tensor"
            )
        end = entry.offset + entry.num_bytes
        if data_start + end > reader.file_bytes:
            raise reader.fail(
                f"truncated: {entry.name!r} ends at byte {data_start + end} but the file has "
                f"{reader.file_bytes}"
            )
        placed[entry.name] = replace(entry, offset=data_start + entry.offset)
    return tuple(placed[entry.name] for entry in entries)
