"""q2_k to q6_k: super-blocks of 256 weights whose sub-block scales are quantised as well.

Layouts are ggml's; the scales are found by the searches in `edge_moe.formats.k_search`.
"""

from __future__ import annotations

import numpy as np

from edge_moe.formats.base import ByteArray, FloatArray, register
from edge_moe.formats.blocks import BlockForm, scales_of
from edge_moe.formats.grid import CodeArray, Grid
from edge_moe.formats.k_search import search_affine, search_symmetric
from edge_moe.formats.layout import (
    join_2bit_planes,
    join_high_bits,
    join_nibble_halves,
    join_nibble_planes,
    join_q3_k_scales,
    join_q4_k_scales,
    split_2bit_planes,
    split_high_bits,
    split_nibble_halves,
    split_nibble_planes,
    split_q3_k_scales,
    split_q4_k_scales,
)

_PAIR, _NIBBLE, _LOW_NIBBLE = np.uint8(2), np.uint8(4), np.uint8(15)  # uint8 stays uint8


class _AffineForm(BlockForm):
    """d * scale * code - dmin * min, all four unsigned."""

    _max_scale: int

    def fit(
        self, blocks: FloatArray, importance: FloatArray | None = None
    ) -> tuple[Grid, CodeArray]:
        return search_affine(
            blocks,
            sub_block=self.sub_block,
            max_code=self.code_range[1],
            max_scale=self._max_scale,
            importance=importance,
        )

    def _fields(self, grid: Grid) -> tuple[ByteArray, ByteArray, ByteArray, ByteArray]:
        """d [n, 2], dmin [n, 2], scales [n, S], mins [n, S], as bytes."""
        assert grid.dmin is not None and grid.mins is not None
        d, dmin = self._scale_bytes(grid.d), self._scale_bytes(grid.dmin)
        return d, dmin, grid.scales.astype(np.uint8), grid.mins.astype(np.uint8)

    def _values(
        self, d: FloatArray, dmin: FloatArray, scales: ByteArray, mins: ByteArray, codes: ByteArray
    ) -> FloatArray:
        """[n, 256] weights; d and dmin [n, 1], scales and mins [n, S], codes [n, 256]."""
        scale, minimum = d * scales.astype(np.float32), dmin * mins.astype(np.float32)
        split = codes.reshape(len(codes), -1, self.sub_block).astype(np.float32)
        return (scale[:, :, None] * split - minimum[:, :, None]).reshape(-1, 256)


class _SymmetricForm(BlockForm):
    """d * scale * code, scale and code signed."""

    _half_scales: int

    def fit(
        self, blocks: FloatArray, importance: FloatArray | None = None
    ) -> tuple[Grid, CodeArray]:
        return search_symmetric(
            blocks,
            sub_block=self.sub_block,
            half_codes=-self.code_range[0],
            half_scales=self._half_scales,
            importance=importance,
        )

    def _values(self, scale: FloatArray, codes: ByteArray) -> FloatArray:
        """[n, 256] weights; scale [n, S], codes less the lowest code [n, 256]."""
        split = (
            codes.reshape(len(codes), -1, self.sub_block).astype(np.float32) + self.code_range[0]
        )
        return (scale[:, :, None] * split).reshape(-1, 256)

    def _unsigned(self, codes: CodeArray) -> ByteArray:
        return (codes - np.int8(self.code_range[0])).view(np.uint8)


@register
class Q2_K(_AffineForm):
    """d * scale * code - dmin * min, code 0..3, per 16 weights a 4-bit scale and a 4-bit min.

    84 bytes for 256 weights: 16 bytes scale | min << 4, 64 bytes of 2-bit planes, d fp16,
    dmin fp16.
    """

    name = "q2_k"
    label = "2-bit"
    ggml_type = 10
    block_size = 256
    block_bytes = 84
    code_range = (0, 3)
    sub_block = 16
    _max_scale = 15

    def join(self, grid: Grid, codes: CodeArray) -> ByteArray:
        d, dmin, scales, mins = self._fields(grid)
        parts = [scales | mins << _NIBBLE, join_2bit_planes(codes.view(np.uint8)), d, dmin]
        return np.concatenate(parts, axis=1)

    def _unpack_blocks(self, packed: ByteArray) -> FloatArray:
        scales, codes = packed[:, :16], split_2bit_planes(packed[:, 16:80])
        d, dmin = scales_of(packed, 80), scales_of(packed, 82)
        return self._values(d, dmin, scales & _LOW_NIBBLE, scales >> _NIBBLE, codes)


@register
class Q3_K(_SymmetricForm):
    """d * scale * code, code -4..3, per 16 weights a 6-bit scale -32..31.

    110 bytes for 256 weights: 32 bytes with the high bit of code + 4, 64 bytes of 2-bit planes
    with its low bits, 12 bytes of scales + 32, d fp16.
    """

    name = "q3_k"
    label = "3-bit"
    ggml_type = 11
    block_size = 256
    block_bytes = 110
    code_range = (-4, 3)
    sub_block = 16
    _half_scales = 32

    def join(self, grid: Grid, codes: CodeArray) -> ByteArray:
        unsigned = self._unsigned(codes)
        parts = [
            join_high_bits(unsigned >> _PAIR),
            join_2bit_planes(unsigned & np.uint8(3)),
            join_q3_k_scales((grid.scales + 32).astype(np.uint8)),
            self._scale_bytes(grid.d),
        ]
        return np.concatenate(parts, axis=1)

    def _unpack_blocks(self, packed: ByteArray) -> FloatArray:
        high, planes, scales = packed[:, :32], packed[:, 32:96], packed[:, 96:108]
        scale = scales_of(packed, 108) * (split_q3_k_scales(scales).astype(np.float32) - 32)
        return self._values(scale, split_2bit_planes(planes) | split_high_bits(high) << _PAIR)


@register
class Q4_K(_AffineForm):
    """d * scale * code - dmin * min, code 0..15, per 32 weights a 6-bit scale and a 6-bit min.

    144 bytes for 256 weights: d fp16, dmin fp16, 12 bytes of scales and mins, 128 bytes of nibbles.
    """

    name = "q4_k"
    label = "4-bit"
    ggml_type = 12
    block_size = 256
    block_bytes = 144
    code_range = (0, 15)
    sub_block = 32
    _max_scale = 63

    def join(self, grid: Grid, codes: CodeArray) -> ByteArray:
        d, dmin, scales, mins = self._fields(grid)
        nibbles = join_nibble_planes(codes.view(np.uint8))
        return np.concatenate([d, dmin, join_q4_k_scales(scales, mins), nibbles], axis=1)

    def _unpack_blocks(self, packed: ByteArray) -> FloatArray:
        scales, mins = split_q4_k_scales(packed[:, 4:16])
        codes = split_nibble_planes(packed[:, 16:])
        return self._values(scales_of(packed, 0), scales_of(packed, 2), scales, mins, codes)


@register
class Q5_K(_AffineForm):
    """q4_k with one bit more: code 0..31.

    176 bytes for 256 weights: d fp16, dmin fp16, 12 bytes of scales and mins, 32 bytes with the
    high bit of the code, 128 bytes of nibbles.
    """

    name = "q5_k"
    label = "5-bit"
    ggml_type = 13
    block_size = 256
    block_bytes = 176
    code_range = (0, 31)
    sub_block = 32
    _max_scale = 63

    def join(self, grid: Grid, codes: CodeArray) -> ByteArray:
        d, dmin, scales, mins = self._fields(grid)
        unsigned = codes.view(np.uint8)
        high, nibbles = (
            join_high_bits(unsigned >> _NIBBLE),
            join_nibble_planes(unsigned & _LOW_NIBBLE),
        )
        return np.concatenate([d, dmin, join_q4_k_scales(scales, mins), high, nibbles], axis=1)

    def _unpack_blocks(self, packed: ByteArray) -> FloatArray:
        scales, mins = split_q4_k_scales(packed[:, 4:16])
        codes = split_nibble_planes(packed[:, 48:]) | split_high_bits(packed[:, 16:48]) << _NIBBLE
        return self._values(scales_of(packed, 0), scales_of(packed, 2), scales, mins, codes)


@register
class Q6_K(_SymmetricForm):
    """d * scale * code, code -32..31, per 16 weights an 8-bit scale -128..127.

    210 bytes for 256 weights: 128 bytes of nibbles (low bits of code + 32), 64 bytes of 2-bit
    planes (its high bits), 16 int8 scales, d fp16.
    """

    name = "q6_k"
    label = "6-bit"
    ggml_type = 14
    block_size = 256
    block_bytes = 210
    code_range = (-32, 31)
    sub_block = 16
    _half_scales = 128

    def join(self, grid: Grid, codes: CodeArray) -> ByteArray:
        unsigned = self._unsigned(codes)
        parts = [
            join_nibble_halves(unsigned & _LOW_NIBBLE),
            join_2bit_planes(unsigned >> _NIBBLE),
            grid.scales.astype(np.int8).view(np.uint8),
            self._scale_bytes(grid.d),
        ]
        return np.concatenate(parts, axis=1)

    def _unpack_blocks(self, packed: ByteArray) -> FloatArray:
        low, high = split_nibble_halves(packed[:, :128]), split_2bit_planes(packed[:, 128:192])
        scales = np.ascontiguousarray(packed[:, 192:208]).view(np.int8)
        return self._values(
            scales_of(packed, 208) * scales.astype(np.float32), low | high << _NIBBLE
        )
