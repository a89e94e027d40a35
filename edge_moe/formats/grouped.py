"""q4_0 and q8_0: blocks of 32 weights with one fp16 scale, bit for bit as ggml writes them."""

from __future__ import annotations

import numpy as np

from edge_moe.formats.base import ByteArray, FloatArray, register
from edge_moe.formats.blocks import BlockForm, scales_of
from edge_moe.formats.grid import CodeArray, Grid
from edge_moe.formats.k_search import search_scale
from edge_moe.formats.scales import reciprocal


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
    code_range = (-8, 7)
    sub_block = 32

    def fit(
        self, blocks: FloatArray, importance: FloatArray | None = None
    ) -> tuple[Grid, CodeArray]:
        """As ggml does; with `importance`, the scale of least weighted squared error."""
        if importance is None:
            extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), axis=1)
            scale = extreme / np.float32(-8)
        else:
            scale = search_scale(blocks, half_codes=8, importance=importance)
        unsigned = np.trunc(blocks * reciprocal(scale) + np.float32(8.5)).clip(0, 15)
        return Grid(scale[:, 0], np.ones_like(scale)), unsigned.astype(np.int8) - np.int8(8)

    def join(self, grid: Grid, codes: CodeArray) -> ByteArray:
        unsigned = (codes + np.int8(8)).view(np.uint8)
        nibbles = unsigned[:, :16] | unsigned[:, 16:] << 4
        return np.concatenate([self._scale_bytes(grid.d), nibbles], axis=1)

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
    code_range = (-127, 127)
    sub_block = 32

    def fit(
        self, blocks: FloatArray, importance: FloatArray | None = None
    ) -> tuple[Grid, CodeArray]:
        """As ggml does: no weight is clipped, so `importance` changes nothing."""
        scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
        scaled = blocks * reciprocal(scale)
        magnitude = np.abs(scaled)
        floor = np.floor(magnitude)
        rounded = np.sign(scaled) * (floor + np.floor(2 * (magnitude - floor)))
        return Grid(scale[:, 0], np.ones_like(scale)), rounded.astype(np.int8)

    def join(self, grid: Grid, codes: CodeArray) -> ByteArray:
        return np.concatenate([self._scale_bytes(grid.d), codes.view(np.uint8)], axis=1)

    def _unpack_blocks(self, packed: ByteArray) -> FloatArray:
        codes = np.ascontiguousarray(packed[:, 2:]).view(np.int8).astype(np.float32)
        return codes * scales_of(packed, 0)
