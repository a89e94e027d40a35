"""Writing a GGUF file byte by byte: keys as they are, tensors of any type from anywhere.

The layout is in `edge_moe.gguf_header`. The `gguf` package writes from arrays and knows fewer
types; this copies.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

from edge_moe.formats.ggml_types import GGML_TYPES_BY_NAME, GgmlType

VERSION = 3
_UINT32, _FLOAT32, _STRING = 4, 6, 8
_INTEGER_CODES = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}


@dataclass(frozen=True)
class RawTensor:
    """One tensor of a file to be written."""

    name: str
    shape: tuple[int, ...]
    """Slowest axis first."""
    type_name: str
    """As ggml spells it."""

    @property
    def kind(self) -> GgmlType:
        return GGML_TYPES_BY_NAME[self.type_name]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) // self.kind.block_size * self.kind.block_bytes


class _Sized(Protocol):
    @property
    def num_bytes(self) -> int: ...


def string_key(name: str, value: str) -> bytes:
    """A key with a string."""
    return _string(name) + struct.pack("<I", _STRING) + _string(value)


def number_key(name: str, value: int | float) -> bytes:
    """A key with a uint32 or a float32."""
    kind, code = (_UINT32, "<I") if isinstance(value, int) else (_FLOAT32, "<f")
    return _string(name) + struct.pack("<I", kind) + struct.pack(code, value)


def integer_key_like(raw: bytes, value: int) -> bytes:
    """The key `raw`, an integer as it stands in a file, with another value of the same type."""
    name_bytes = struct.unpack_from("<Q", raw)[0]
    head = 8 + name_bytes + 4
    kind = struct.unpack_from("<I", raw, head - 4)[0]
    return raw[:head] + struct.pack(_INTEGER_CODES[kind], value)


def offsets(tensors: Sequence[_Sized], alignment: int) -> list[int]:
    """Where each tensor starts, counted from the start of the data, and where the data ends."""
    found, at = [], 0
    for tensor in tensors:
        found.append(at)
        at += _aligned(tensor.num_bytes, alignment)
    return [*found, at]


def header_bytes(keys: Sequence[bytes], tensors: Sequence[RawTensor], alignment: int) -> bytes:
    """Everything in front of the data, padded to where it starts."""
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(keys)), *keys]
    for tensor, offset in zip(tensors, offsets(tensors, alignment), strict=False):
        axes = tuple(reversed(tensor.shape))
        parts.append(_string(tensor.name))
        parts.append(struct.pack(f"<I{len(axes)}Q", len(axes), *axes))
        parts.append(struct.pack("<IQ", tensor.kind.ggml_type, offset))
    header = b"".join(parts)
    return header + bytes(_aligned(len(header), alignment) - len(header))


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _aligned(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment
