"""q2_k, q3_k, q4_k: super-blocks of 256 weights whose sub-block scales are quantised as well.

Layouts are ggml's; the scales are found by the searches in `edge_moe.formats.k_search`.
"""

from __future__ import annotations

import numpy as np

from edge_moe.formats.base import ByteArray, FloatArray, register
from edge_moe.formats.blocks import BlockForm, scales_of
from edge_moe.formats.k_search import search_affine, search_symmetric
from edge_moe.formats.layout import (
    join_2bit_planes,
    join_high_bits,
    join_nibble_planes,
    join_q3_k_scales,
    join_q4_k_scales,
    split_2bit_planes,
    split_high_bits,
    split_nibble_planes,
    split_q3_k_scales,
    split_q4_k_scales,
)


@register
class Q2_K(BlockForm):
    """d * scale * code - dmin * min, code 0..3, per 16 weights a 4-bit scale and a 4-bit min.

    84 bytes for 256 weights: 16 bytes scale | min << 4, 64 bytes of 2-bit planes, d fp16,
    dmin fp16.
    """

    name = "q2_k"
    label = "2-bit"
    ggml_type = 10
    block_size = 256
    block_bytes = 84

    def _pack_blocks(self, blocks: FloatArray) -> ByteArray:
        fit = search_affine(blocks, sub_block=16, max_code=3, max_scale=15)
        parts = [
            fit.scales | fit.mins << 4,
            join_2bit_planes(fit.codes),
            self._scale_bytes(fit.d),
            self._scale_bytes(fit.dmin),
        ]
        return np.concatenate(parts, axis=1)

    def _unpack_blocks(self, packed: ByteArray) -> FloatArray:
        scales, planes = packed[:, :16], packed[:, 16:80]
        scale = scales_of(packed, 80) * (scales & 15).astype(np.float32)
        minimum = scales_of(packed, 82) * (scales >> 4).astype(np.float32)
        codes = split_2bit_planes(planes).reshape(-1, 16, 16).astype(np.float32)
        return (scale[:, :, None] * codes - minimum[:, :, None]).reshape(-1, 256)


@register
class Q3_K(BlockForm):
    """d * scale * code, code -4..3, per 16 weights a 6-bit scale -32..31.

    110 bytes for 256 weights: 32 bytes with the high bit of code + 4, 64 bytes of 2-bit planes
    with its low bits, 12 bytes of scales + 32, d fp16.
    """

    name = "q3_k"
    label = "3-bit"
    ggml_type = 11
    block_size = 256
    block_bytes = 110

    def _pack_blocks(self, blocks: FloatArray) -> ByteArray:
        fit = search_symmetric(blocks, sub_block=16, half_codes=4, half_scales=32)
        codes = (fit.codes + 4).astype(np.uint8)
        parts = [
            join_high_bits(codes >> np.uint8(2)),
            join_2bit_planes(codes & np.uint8(3)),
            join_q3_k_scales((fit.scales + 32).astype(np.uint8)),
            self._scale_bytes(fit.d),
        ]
        return np.concatenate(parts, axis=1)

    def _unpack_blocks(self, packed: ByteArray) -> FloatArray:
        high, planes, scales = packed[:, :32], packed[:, 32:96], packed[:, 96:108]
        scale = scales_of(packed, 108) * (split_q3_k_scales(scales).astype(np.float32) - 32)
        codes = split_2bit_planes(planes) | split_high_bits(high) << 2
        signed = codes.reshape(-1, 16, 16).astype(np.float32) - 4
        return (scale[:, :, None] * signed).reshape(-1, 256)


@register
class Q4_K(BlockForm):
    """d * scale * code - dmin * min, code 0..15, per 32 weights a 6-bit scale and a 6-bit min.

    144 bytes for 256 weights: d fp16, dmin fp16, 12 bytes of scales and mins, 128 bytes of nibbles.
    """

    name = "q4_k"
    label = "4-bit"
    ggml_type = 12
    block_size = 256
    block_bytes = 144

    def _pack_blocks(self, blocks: FloatArray) -> ByteArray:
        fit = search_affine(blocks, sub_block=32, max_code=15, max_scale=63)
        parts = [
            self._scale_bytes(fit.d),
            self._scale_bytes(fit.dmin),
            join_q4_k_scales(fit.scales, fit.mins),
            join_nibble_planes(fit.codes),
        ]
        return np.concatenate(parts, axis=1)

    def _unpack_blocks(self, packed: ByteArray) -> FloatArray:
        scales, mins = split_q4_k_scales(packed[:, 4:16])
        scale = scales_of(packed, 0) * scales.astype(np.float32)
        minimum = scales_of(packed, 2) * mins.astype(np.float32)
        codes = split_nibble_planes(packed[:, 16:]).reshape(-1, 8, 32).astype(np.float32)
        return (scale[:, :, None] * codes - minimum[:, :, None]).reshape(-1, 256)
