"""Ternary forms tq1_0 and tq2_0, and q2_0 with its four levels -1, 0, 1, 2.

ggml's own ternary quantiser takes d = max|w|, which zeroes nearly everything of an ordinary weight
matrix (relative error 0.81 on Gaussian weights). Here every block gets the trits and the scale of
least squared error (0.43), written in ggml's byte layouts. Weights that already are {-d, 0, d} with
one d per block pass through unchanged.
"""

from __future__ import annotations

import numpy as np

from edge_moe.formats.base import ByteArray, FloatArray, register
from edge_moe.formats.blocks import BlockForm, scales_of
from edge_moe.formats.grid import CodeArray, Grid, column_weights
from edge_moe.formats.layout import join_2bit_planes, split_2bit_planes
from edge_moe.formats.scales import as_half, reciprocal

TERNARY_FORMS = ("tq1_0", "tq2_0", "q2_0", "int2_b64", "int2_b32")
"""Forms of one scale per block that hold trits exactly; those of 2 bits have the level 2 or -2."""

_POWERS = np.array([81, 27, 9, 3, 1], dtype=np.uint16)

TRITS = ((np.arange(256)[:, None] * np.array([1, 3, 9, 27, 81]) % 256 * 3 >> 8) - 1).astype(np.int8)
"""[256, 5] the five trits (-1, 0, 1) of every tq1_0 byte, first digit first."""


def ternarise(blocks: FloatArray, importance: FloatArray | None = None) -> tuple[Grid, CodeArray]:
    """(d [n], trits [n, B]) minimising |w - d t|^2 over t in {-1, 0, 1} and d.

    For a fixed d the best trits are non-zero where |w| > d / 2, so they are the k largest |w|; with
    d their mean, k of them leave the error |w|^2 - (sum of them)^2 / k, and the best k is found by
    one sort (the global optimum of the fixed point of Ternary Weight Networks, arXiv:1605.04711,
    eq. 4-5). The same holds when squares are weighted by `importance` [B].
    """
    magnitude = np.abs(blocks)
    weights = column_weights(importance, blocks.shape[1])
    if weights is None:
        sums: FloatArray = np.cumsum(np.sort(magnitude, axis=1)[:, ::-1], axis=1)
        counts: FloatArray = np.arange(1, blocks.shape[1] + 1, dtype=np.float32)[None]
    else:
        order = np.argsort(magnitude, axis=1)[:, ::-1]
        ordered = weights[:, 0][order]
        sums = np.cumsum(ordered * np.take_along_axis(magnitude, order, axis=1), axis=1)
        counts = np.cumsum(ordered, axis=1)
    shares: FloatArray = sums / counts
    best = np.argmax(sums * shares, axis=1)[:, None]
    scale: FloatArray = np.take_along_axis(shares, best, axis=1)
    half = as_half(scale)
    is_used = (magnitude > half / 2) & (half > 0)
    trits = np.where(is_used, np.sign(blocks), np.float32(0)).astype(np.int8)
    return Grid(scale[:, 0], np.ones_like(scale)), trits


def absmean(blocks: FloatArray) -> tuple[Grid, CodeArray]:
    """d = mean |w|, trits = w / d rounded and clipped, for `blocks` [n, B].

    BitNet's rule (arXiv:2402.17764), for weights that were trained with it.
    """
    scale = np.abs(blocks).mean(axis=1, keepdims=True)
    trits = np.rint(blocks * reciprocal(as_half(scale))).clip(-1, 1).astype(np.int8)
    return Grid(scale[:, 0], np.ones_like(scale)), trits


class TernaryForm(BlockForm):
    """Trits times one scale per block."""

    block_size = 256
    code_range = (-1, 1)
    sub_block = 256

    def fit(
        self, blocks: FloatArray, importance: FloatArray | None = None
    ) -> tuple[Grid, CodeArray]:
        return ternarise(blocks, importance)


@register
class TQ1_0(TernaryForm):
    """1.6875 bits per weight: five trits in a byte.

    54 bytes for 256 weights. Byte m < 32 holds weights m + 32 i, byte 32 + m holds 160 + m + 16 i
    (i = 0..4), byte 48 + m holds 240 + m + 4 i (i = 0..3); then d as fp16. With digits t + 1 and
    the first weight most significant, a byte is ceil(base-3 number * 256 / 243), so that digits
    come out by multiplying with 3 and taking the carry.
    """

    name = "tq1_0"
    label = "ternary"
    ggml_type = 34
    block_bytes = 54

    def join(self, grid: Grid, codes: CodeArray) -> ByteArray:
        digits = (codes + np.int8(1)).astype(np.uint16)
        parts = [
            np.einsum("nim,i->nm", digits[:, :160].reshape(-1, 5, 32), _POWERS),
            np.einsum("nim,i->nm", digits[:, 160:240].reshape(-1, 5, 16), _POWERS),
            np.einsum("nim,i->nm", digits[:, 240:].reshape(-1, 4, 4), _POWERS[:4]),
        ]
        numbers = np.concatenate(parts, axis=1)
        packed = ((numbers * 256 + 242) // 243).astype(np.uint8)
        return np.concatenate([packed, self._scale_bytes(grid.d)], axis=1)

    def _unpack_blocks(self, packed: ByteArray) -> FloatArray:
        trits = TRITS[packed[:, :52]].swapaxes(1, 2)  # [n, 5, 52]
        num_blocks = len(packed)
        parts = [
            trits[:, :, :32].reshape(num_blocks, 160),
            trits[:, :, 32:48].reshape(num_blocks, 80),
            trits[:, :4, 48:].reshape(num_blocks, 16),
        ]
        return scales_of(packed, 52) * np.concatenate(parts, axis=1).astype(np.float32)


@register
class TQ2_0(TernaryForm):
    """The same trits at two bits each: 64 bytes of 2-bit planes (codes t + 1), then d as fp16."""

    name = "tq2_0"
    label = "ternary"
    ggml_type = 35
    block_bytes = 66

    def join(self, grid: Grid, codes: CodeArray) -> ByteArray:
        planes = join_2bit_planes((codes + np.int8(1)).view(np.uint8))
        return np.concatenate([planes, self._scale_bytes(grid.d)], axis=1)

    def _unpack_blocks(self, packed: ByteArray) -> FloatArray:
        codes = split_2bit_planes(packed[:, :64])
        return scales_of(packed, 64) * (codes.astype(np.float32) - 1)


_QUAD_SHIFTS = np.array([0, 2, 4, 6], dtype=np.uint8)


@register
class Q2_0(BlockForm):
    """2-bit codes 0..3 for d * (code - 1); d may be negative, so the side with level 2 is chosen.

    18 bytes for 64 weights: d fp16, then byte m holds weights 4 m + i at bits 2 i.
    """

    name = "q2_0"
    label = "2-bit"
    ggml_type = 42
    block_size = 64
    block_bytes = 18
    code_range = (-1, 2)
    sub_block = 64

    def fit(
        self, blocks: FloatArray, importance: FloatArray | None = None
    ) -> tuple[Grid, CodeArray]:
        columns = np.ascontiguousarray(blocks.T)  # [64, n]: reductions run over the outer axis
        scale = search_four_levels(columns, column_weights(importance, 64))
        codes = to_four_levels(columns, as_half(scale)).astype(np.int8)
        return Grid(scale, np.ones_like(scale)[:, None]), np.ascontiguousarray(codes.T)

    def join(self, grid: Grid, codes: CodeArray) -> ByteArray:
        unsigned = (codes + np.int8(1)).view(np.uint8).reshape(-1, 16, 4)
        quads = np.bitwise_or.reduce(unsigned << _QUAD_SHIFTS, axis=2)
        return np.concatenate([self._scale_bytes(grid.d), quads], axis=1)

    def _unpack_blocks(self, packed: ByteArray) -> FloatArray:
        quads = packed[:, 2:, None] >> _QUAD_SHIFTS & 3
        codes = quads.reshape(len(packed), 64).astype(np.float32)
        return scales_of(packed, 0) * (codes - 1)


# starting scales as a share of max|w|, both signs; 1 and 1/2 make exact levels exact
_Q2_0_STARTS = tuple(sign * share for share in (0.5, 1.0, 0.36, 0.43) for sign in (1, -1))


def to_four_levels(columns: FloatArray, scale: FloatArray) -> FloatArray:
    """Nearest of -1, 0, 1, 2 to `columns` [B, n] / `scale` [n]."""
    levels: FloatArray = columns * reciprocal(scale)
    np.rint(levels, out=levels)
    np.clip(levels, -1, 2, out=levels)
    return levels


def search_four_levels(columns: FloatArray, weights: FloatArray | None) -> FloatArray:
    """Scale of least squared error per column [B, n]: several starts, alternating least squares.

    With levels fixed the best scale is (w . q) / (q . q), which leaves |w|^2 - (w . q)^2 / (q . q).
    `weights` [B, 1] enter every product.
    """
    largest = np.abs(columns).max(axis=0)
    best_scale: FloatArray = np.zeros_like(largest)
    best_gain = np.zeros_like(largest)
    for share in _Q2_0_STARTS:
        scale = largest * np.float32(share)
        for _ in range(3):
            levels = to_four_levels(columns, scale)
            weighted = levels if weights is None else levels * weights
            dot = np.einsum("bn,bn->n", columns, weighted)
            scale = dot * reciprocal(np.einsum("bn,bn->n", levels, weighted))
        gain = dot * scale
        is_better = gain > best_gain * np.float32(1 + 1e-6)  # a tie keeps the earlier start
        best_gain = np.where(is_better, gain, best_gain)
        best_scale = np.where(is_better, scale, best_scale)
    return best_scale
