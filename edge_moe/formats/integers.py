"""Integer forms of ONNX Runtime's QMoE: codes in bit order, one float32 scale per block or row.

QMoE's weight is (q - 2^(bits - 1)) * scale, with codes q packed along the row, lowest bits first
(https://github.com/microsoft/onnxruntime, docs/contrib_ops). A float32 graph holds float32 scales;
those of the block forms are values that fp16 holds too, so a half-precision graph can hold the
same weights.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from edge_moe.formats.base import (
    DROP,
    FORM_NAMES,
    ByteArray,
    FloatArray,
    Form,
    get_form,
    register,
)
from edge_moe.formats.blocks import BlockForm, check_row_bytes, require_weights
from edge_moe.formats.grid import CodeArray, Grid, column_weights
from edge_moe.formats.k_search import search_scale
from edge_moe.formats.scales import as_half, reciprocal
from edge_moe.formats.ternary import search_four_levels, to_four_levels

SCALE_BYTES = 4


def pack_codes(codes: ByteArray, bits: int) -> ByteArray:
    """Codes [..., n] below 2^bits -> [..., n * bits / 8]; `bits` is 2, 4 or 8."""
    per_byte = 8 // bits
    grouped = codes.reshape(*codes.shape[:-1], -1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    packed: ByteArray = np.bitwise_or.reduce(grouped << shifts, axis=-1)
    return packed


def unpack_codes(packed: ByteArray, bits: int) -> ByteArray:
    """Inverse of `pack_codes`."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    codes = packed[..., None] >> shifts & np.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)


def onnxruntime_copy_bytes(form: str, num_weights: int) -> int:
    """Bytes that onnxruntime holds of so many weights beyond those of `form` itself."""
    kind = integer_form(form)
    return num_weights // kind.block_size * kind.onnxruntime_copy_bytes if kind else 0


def integer_form(name: str) -> IntegerForm | None:
    """How QMoE's codes lie in the form `name`; None where it is another kind of form."""
    kind = get_form(name) if name in FORM_NAMES and name != DROP else None
    return kind if isinstance(kind, IntegerForm) else None


class IntegerForm(Form):
    """What the graph builder needs to know of a form that QMoE reads."""

    bits: ClassVar[int]
    row_blocks: ClassVar[bool] = False
    """One scale for the whole row, whatever its width."""
    onnxruntime_copy_bytes: ClassVar[int] = 0
    """What onnxruntime 1.32 holds on a CPU per block beyond its bytes in the file, measured: it
    packs codes anew with the scales between them, and with sums where activations are rounded to 8
    bits, while the scales of the file stay."""

    def split(self, packed: ByteArray, width: int) -> tuple[ByteArray, FloatArray]:
        """[rows, row_bytes] -> (codes [rows, width * bits / 8], scales [rows, blocks])."""
        check_row_bytes(self, packed, width)
        block = width if self.row_blocks else self.block_size
        code_bytes = block * self.bits // 8
        blocks = packed.reshape(len(packed), -1, code_bytes + SCALE_BYTES)
        codes = np.ascontiguousarray(blocks[..., :code_bytes]).reshape(len(packed), -1)
        scales = np.ascontiguousarray(blocks[..., code_bytes:]).view("<f4")
        return codes, scales.reshape(len(packed), -1).astype(np.float32)


class _IntegerBlocks(BlockForm, IntegerForm):
    """Codes of a block, then its scale as float32."""

    ggml_type = None

    def join(self, grid: Grid, codes: CodeArray) -> ByteArray:
        self._scale_bytes(grid.d)  # refuses what fp16 cannot hold
        scales = as_half(grid.d).astype("<f4").reshape(-1, 1).view(np.uint8)
        unsigned = (codes + np.int8(2 ** (self.bits - 1))).view(np.uint8)
        return np.concatenate([pack_codes(unsigned, self.bits), scales], axis=1)

    def _unpack_blocks(self, packed: ByteArray) -> FloatArray:
        codes, scales = self.split(packed, self.block_size)
        signed = unpack_codes(codes, self.bits).astype(np.float32) - 2 ** (self.bits - 1)
        weights: FloatArray = signed * scales
        return weights


class _Int4(_IntegerBlocks):
    """4-bit codes -8..7 times d of least squared error, which may be negative."""

    label = "4-bit"
    onnxruntime_copy_bytes = 2 * SCALE_BYTES
    bits = 4
    code_range = (-8, 7)

    def fit(
        self, blocks: FloatArray, importance: FloatArray | None = None
    ) -> tuple[Grid, CodeArray]:
        scale = search_scale(blocks, half_codes=8, importance=importance)
        codes = np.rint(blocks * reciprocal(as_half(scale))).clip(-8, 7)
        return Grid(scale[:, 0], np.ones_like(scale)), codes.astype(np.int8)


class _Int2(_IntegerBlocks):
    """2-bit codes -2..1 times d, which may be negative: the level 2 is on the side that needs it.

    Weights that are {-d, 0, d} with a d that fp16 holds pass through unchanged: ternary weights
    take codes -1, 0 and 1.
    """

    label = "2-bit"
    onnxruntime_copy_bytes = SCALE_BYTES
    bits = 2
    code_range = (-2, 1)

    def fit(
        self, blocks: FloatArray, importance: FloatArray | None = None
    ) -> tuple[Grid, CodeArray]:
        columns = np.ascontiguousarray(blocks.T)  # [B, n]
        weights = column_weights(importance, self.block_size)
        scale = -search_four_levels(columns, weights)
        codes = -to_four_levels(columns, -as_half(scale))
        return Grid(scale, np.ones_like(scale)[:, None]), np.ascontiguousarray(
            codes.T.astype(np.int8)
        )


@register
class Int2B64(_Int2):
    """2.5 bits per weight: 16 bytes of codes and a scale for 64 weights."""

    name = "int2_b64"
    block_size = 64
    block_bytes = 20
    sub_block = 64


@register
class Int2B32(_Int2):
    """3 bits per weight, for rows that are no multiple of 64."""

    name = "int2_b32"
    block_size = 32
    block_bytes = 12
    sub_block = 32


@register
class Int4B64(_Int4):
    """4.5 bits per weight: 32 bytes of codes and a scale for 64 weights."""

    name = "int4_b64"
    block_size = 64
    block_bytes = 36
    sub_block = 64


@register
class Int4B32(_Int4):
    """5 bits per weight, for rows that are no multiple of 64."""

    name = "int4_b32"
    block_size = 32
    block_bytes = 20
    sub_block = 32


@register
class Int8Row(IntegerForm):
    """8-bit codes -127..127 times max|w| / 127 of the row: its bytes, then d as float32.

    QMoE computes with these exactly; its 8-bit blocks round activations to 8 bits as well.
    """

    name = "int8_row"
    label = "8-bit"
    ggml_type = None
    block_size = 1
    block_bytes = 1
    bits = 8
    row_blocks = True

    def row_bytes(self, width: int) -> int:
        return width + SCALE_BYTES

    def pack(self, weights: FloatArray) -> ByteArray:
        require_weights(self, weights)
        rows = np.ascontiguousarray(weights, dtype=np.float32)
        scale = (np.abs(rows).max(axis=-1, keepdims=True) / np.float32(127)).astype("<f4")
        codes = np.rint(rows * reciprocal(scale)).clip(-127, 127).astype(np.int16) + 128
        return np.concatenate([codes.astype(np.uint8), scale.view(np.uint8)], axis=-1)

    def unpack(self, packed: ByteArray, width: int) -> FloatArray:
        check_row_bytes(self, packed, width)
        codes, scales = self.split(packed.reshape(-1, packed.shape[-1]), width)
        weights: FloatArray = (codes.astype(np.float32) - 128) * scales
        return weights.reshape(*packed.shape[:-1], width)
