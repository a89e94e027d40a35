"""q4_0 and q8_0: blocks of 32 weights with one fp16 scale, bit for bit as ggml writes them."""

from __future__ import annotations

import numpy as np

from edge_moe.formats.base import ByteArray, FloatArray, register
from edge_moe.formats.blocks import BlockForm, reciprocal, scales_of


@register
class Q4_0(BlockForm):
    """4-bit codes 0..15 for d * (code - 8); d makes the weight of largest magnitude -8.

    18 bytes for 32 weights: d fp16, then byte m holds weight m (low nibble) and m + 16 (high).
    """

    name = "q4_0"
    label = "4-bit"
    ggml_type = 2
    block_size = 32
    block_bytes = 18

    def _pack_blocks(self, blocks: FloatArray) -> ByteArray:
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), axis=1)
        scale = largest / np.float32(-8)
        codes = np.trunc(blocks * reciprocal(scale) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
        nibbles = codes[:, :16] | codes[:, 16:] << 4
        return np.concatenate([self._scale_bytes(scale[:, 0]), nibbles], axis=1)

    def _unpack_blocks(self, packed: ByteArray) -> FloatArray:
        nibbles = packed[:, 2:]
        codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.float32)
        return scales_of(packed, 0) * (codes - 8)


@register
class Q8_0(BlockForm):
    """Signed 8-bit codes times d = max|w| / 127, halves rounded away from zero.

    34 bytes for 32 weights: d fp16, then 32 int8.
    """

    name = "q8_0"
    label = "8-bit"
    ggml_type = 8
    block_size = 32
    block_bytes = 34

    def _pack_blocks(self, blocks: FloatArray) -> ByteArray:
        scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
        scaled = blocks * reciprocal(scale)
        magnitude = np.abs(scaled)
        floor = np.floor(magnitude)
        rounded = np.sign(scaled) * (floor + np.floor(2 * (magnitude - floor)))
        codes = rounded.astype(np.int8).view(np.uint8)
        return np.concatenate([self._scale_bytes(scale[:, 0]), codes], axis=1)

    def _unpack_blocks(self, packed: ByteArray) -> FloatArray:
        codes = np.ascontiguousarray(packed[:, 2:]).view(np.int8).astype(np.float32)
        return codes * scales_of(packed, 0)
