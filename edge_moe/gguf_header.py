"""The header of a GGUF file: metadata and tensor list, read and checked without the weights.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: "GGUF", version
u32, tensor count u64, key count u64; keys (string, type u32, value); tensors (name, axis count u32,
axes u64 fastest first, type u32, offset u64); padding to `general.alignment`; data. A string is a
u64 length and UTF-8 bytes, an array a type u32, a count u64 and the items.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path

from edge_moe.errors import CheckpointError

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
# ggml type -> (name, weights per block, bytes per block), as in ggml.c's type_traits
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
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
_MAX_AXES = 4
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


@dataclass(frozen=True)
class GgufTensorInfo:
    """One tensor of the list."""

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
    metadata: dict[str, Value]
    tensors: tuple[GgufTensorInfo, ...]
    total_bytes: int
    """Size of the file."""

    def number(self, key: str) -> int | None:
        """Metadata `{architecture}.{key}` as an int; None when absent or not one."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def bytes_by_component(self) -> dict[str, int]:
        """Component -> bytes of its tensors, largest first."""
        return _summed({(info.name, info.component): info.num_bytes for info in self.tensors})

    def bytes_by_type(self) -> dict[str, int]:
        """Type name -> bytes of its tensors, largest first."""
        return _summed({(info.name, info.type_name): info.num_bytes for info in self.tensors})


def _summed(sizes: dict[tuple[str, str], int]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for (_, group), num_bytes in sizes.items():
        sums[group] = sums.get(group, 0) + num_bytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


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

    def __init__(self, handle: BufferedReader, path: Path, file_bytes: int) -> None:
        self._handle = handle
        self.path = path
        self.file_bytes = file_bytes

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
        kept = min(count, _KEPT_ITEMS)
        first = tuple(self.value(kind, nesting) for _ in range(kept))
        if kind in _SCALARS:
            self.skip((count - kept) * item_bytes)
        elif kind == _STRING:
            for _ in range(count - kept):
                self.skip(self.u64())
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
    metadata = _read_metadata(reader, reader.count("metadata keys", _MIN_KEY_BYTES))
    entries = [_read_entry(reader) for _ in range(num_tensors)]
    tensors = _place(reader, entries, _alignment(reader, metadata))
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise reader.fail("the key general.architecture is missing or not a string")
    return GgufHeader(reader.path, version, architecture, metadata, tensors, reader.file_bytes)


def _read_metadata(reader: _Reader, num_keys: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(num_keys):
        key = reader.string()
        if key in metadata:
            raise reader.fail(f"the key {key!r} appears twice")
        metadata[key] = reader.value(reader.u32())
    return metadata


def _alignment(reader: _Reader, metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", 32)
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
    if kind not in _TYPES:
        raise CheckpointError(
            f"{reader.path}: tensor {name!r} has the ggml type {kind}, which this edge-moe does "
            "not know"
        )
    type_name, block_size, block_bytes = _TYPES[kind]
    if axes and axes[0] % block_size:
        raise reader.fail(
            f"tensor {name!r} has rows of {axes[0]}, no multiple of {type_name}'s {block_size}"
        )
    num_bytes = prod(axes) // block_size * block_bytes
    return GgufTensorInfo(name, tuple(reversed(axes)), type_name, reader.u64(), num_bytes)


def _place(
    reader: _Reader, entries: list[GgufTensorInfo], alignment: int
) -> tuple[GgufTensorInfo, ...]:
    """Entries with offsets from the start of the file, checked against its size and each other."""
    data_start = -(-reader.position // alignment) * alignment
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
        placed[entry.name] = GgufTensorInfo(
            entry.name, entry.shape, entry.type_name, data_start + entry.offset, entry.num_bytes
        )
    return tuple(placed[entry.name] for entry in entries)
