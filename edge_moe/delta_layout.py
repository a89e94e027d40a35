"""How a delta file lays out its tensors: tables of packed segments, and their bytes.

A safetensors file, without pickle:

    __metadata__  edge_moe_delta: JSON of `DeltaInfo`
                  edge_moe_tables: sha256 of that, and of the five tables
    scales        F32 [T]  per tensor
    kept          I32 [S]  signs of every segment
    sizes         I32 [S]  its bytes
    checksums     I32 [S]  zlib.crc32 of them, as a signed number
    coding        U8  [S]  low bits of a gap; 128 added where zeros are listed (`sparse_signs`)
    dense         U8       segments of dense tensors, one after the other
    layers.N      U8       those of the experts of layer N

Tensors are counted thus: dense ones in the order of `DeltaInfo.dense`, then gate_proj (where there
is one), up_proj and down_proj of every expert of every MoE layer. A tensor is packed in segments of
2^20 entries of its rows one after the other; the last may be shorter.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edge_moe.errors import DeltaError, FormError
from edge_moe.sparse_signs import (
    MOST_LENGTH,
    MOST_RICE_BITS,
    Flags,
    PackedSigns,
    Places,
    unpack_signs,
)
from edge_moe.tensor_info import FloatArray

TABLES_KEY = "edge_moe_tables"
"""Of the file's metadata."""
SCALES, DENSE_NAME = "scales", "dense"
TABLES = {SCALES: "F32", "kept": "I32", "sizes": "I32", "checksums": "I32", "coding": "U8"}
"""Name -> dtype of every table, in their order: one of tensors, and those of segments."""
NUMPY_DTYPES = {"F32": "<f4", "I32": "<i4", "U8": "u1"}
SEGMENT_DTYPE = np.dtype(
    [(name, NUMPY_DTYPES[dtype]) for name, dtype in TABLES.items() if name != SCALES]
)
"""A segment's row of its tables."""
REMEDY = "make it again with `edge-moe delta`, or copy it again"
_LISTS_ZEROS = 128


@dataclass(frozen=True)
class Segment:
    """A part of a tensor, and where its packed signs lie."""

    start: int
    """Its first entry, counted over the tensor's rows."""
    length: int
    offset: int
    """First byte in the file."""
    num_bytes: int
    num_kept: int
    coding: int
    checksum: int
    """As the table has it."""


class DeltaTensor(NamedTuple):
    """scale * s, to be added to a tensor of the base."""

    shape: tuple[int, ...]
    scale: float
    segments: tuple[Segment, ...]

    @property
    def offset(self) -> int:
        return self.segments[0].offset

    @property
    def num_bytes(self) -> int:
        """Packed, one segment after the other."""
        return sum(segment.num_bytes for segment in self.segments)

    def signed(self, is_negative: Flags) -> FloatArray:
        """[k] the scale, or less than 0 where a sign is."""
        return np.where(is_negative, np.float32(-self.scale), np.float32(self.scale))


def num_segments(num_weights: int) -> int:
    """Of a tensor of so many entries."""
    return -(-num_weights // MOST_LENGTH)


def layer_name(layer_id: int) -> str:
    """Of the tensor with the segments of a layer's experts."""
    return f"layers.{layer_id}"


def tables_digest(info: str, tables: Iterable[npt.NDArray[np.generic]]) -> str:
    """sha256 of the header's JSON, and of the tables in their order."""
    digest = hashlib.sha256(info.encode())
    for table in tables:
        digest.update(np.ascontiguousarray(table).tobytes())
    return digest.hexdigest()


def segment_row(packed: PackedSigns) -> tuple[int, int, int, int]:
    """What the tables say of a segment, as a row of `SEGMENT_DTYPE`."""
    coding = packed.rice_bits + _LISTS_ZEROS * packed.lists_zeros
    return packed.num_kept, len(packed.data), _checksum(packed.data), coding


def wrong_segments(
    kept: npt.NDArray[np.int64], coding: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> Flags:
    """[S] which segments of `lengths` no writer describes so."""
    return (kept < 0) | (kept > lengths) | (coding % _LISTS_ZEROS > MOST_RICE_BITS)


def split_packed(
    tensors: Sequence[DeltaTensor], raw: memoryview
) -> Iterator[tuple[DeltaTensor, memoryview]]:
    """Every tensor and its bytes, of `raw` in which they lie one after the other."""
    begin = 0
    for tensor in tensors:
        yield tensor, raw[begin : begin + tensor.num_bytes]
        begin += tensor.num_bytes


def unpack_tensor(
    tensor: DeltaTensor, raw: bytes | memoryview, what: str
) -> Iterator[tuple[Places, Flags]]:
    """(places in the tensor's rows, whether each is -1) of every segment, in order.

    `raw` are the tensor's `num_bytes`, `what` is what messages call it.

    Raises:
        DeltaError: they are not what was written.
    """
    begin = 0
    for part in tensor.segments:
        data = bytes(raw[begin : begin + part.num_bytes])
        begin += part.num_bytes
        if _checksum(data) != part.checksum:
            raise DeltaError(f"{what} is damaged (its checksum differs): {REMEDY}")
        if not part.num_kept:
            continue
        lists_zeros = part.coding >= _LISTS_ZEROS
        packed = PackedSigns(part.num_kept, part.coding % _LISTS_ZEROS, lists_zeros, data)
        try:
            places, is_negative = unpack_signs(packed, part.length)
        except FormError as error:
            raise DeltaError(f"{what} is damaged ({error}): {REMEDY}") from None
        places += part.start
        yield places, is_negative


def _checksum(data: bytes) -> int:
    """crc32, signed."""
    found = zlib.crc32(data)
    return found - 2**32 if found >= 2**31 else found
