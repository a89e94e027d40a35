"""Scale searches behind the k-quants, by alternating least squares over whole arrays of blocks.

Letters: n super-blocks, S sub-blocks in each, B weights in a sub-block; arrays of weights are held
as [B, n, S], so that sums over a sub-block run over the outer axis. Errors are plain squared
errors, or weighted by the importance of a column; ggml weighs by |w| as well, and its searches
(make_qkx2_quants, make_q3_quants) are the model of these.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edge_moe.formats.base import FloatArray
from edge_moe.formats.grid import CodeArray, Grid, column_weights
from edge_moe.formats.scales import as_half, reciprocal

_REFINEMENTS = 3
# starting scales are range / (max_code + this): positive ones clip a block's extremes
_AFFINE_STARTS = (-1.0, -0.5, 0.0, 0.6, 1.2, 2.4)
_SYMMETRIC_STARTS = (0.0, 0.45, 0.9, -0.45)


class _Columns(NamedTuple):
    """The weights to be packed, and how much each of them counts."""

    x: FloatArray  # [B, n, S]
    weights: FloatArray | None  # [B, 1, S] of mean 1; None counts all alike
    total: FloatArray | np.float32  # [1, S] sum of `weights`, or B
    x_sum: FloatArray  # [n, S] weighted sum of x

    @classmethod
    def split(cls, blocks: FloatArray, sub_block: int, importance: FloatArray | None) -> _Columns:
        """`blocks` [n, S * B], `importance` [S * B] or None."""
        split = blocks.reshape(len(blocks), -1, sub_block)
        x = np.ascontiguousarray(split.transpose(2, 0, 1))
        weights = column_weights(importance, sub_block)
        if weights is None:
            return cls(x, None, np.float32(sub_block), x.sum(axis=0))
        total = weights.sum(axis=0)[None]
        return cls(x, weights[:, None], total, np.einsum("bns,bs->ns", x, weights))

    def weigh(self, values: FloatArray) -> FloatArray:
        """`values` [B, n, S] times the weights; the same array where all count alike."""
        return values if self.weights is None else values * self.weights


class _Sums(NamedTuple):
    """Weighted sums over each sub-block, [n, S]: q code, x weight."""

    q: FloatArray
    qq: FloatArray
    xq: FloatArray


class _AffineScales(NamedTuple):
    d: FloatArray  # [n]
    dmin: FloatArray  # [n]
    scales: FloatArray  # [n, S] whole numbers
    mins: FloatArray  # [n, S] whole numbers

    def effective(self) -> tuple[FloatArray, FloatArray]:
        """(scale, minimum) of each sub-block [n, S], as unpacking computes them."""
        return self.d[:, None] * self.scales, self.dmin[:, None] * self.mins


def search_affine(
    blocks: FloatArray,
    *,
    sub_block: int,
    max_code: int,
    max_scale: int,
    importance: FloatArray | None = None,
) -> tuple[Grid, CodeArray]:
    """Best codes 0..max_code, scales and mins 0..max_scale for `blocks` [n, S * B]."""
    columns = _Columns.split(blocks, sub_block, importance)
    scale, minimum = _fit_affine(columns, max_code)
    found = _quantise_affine(scale, minimum, max_scale)
    best, best_error = found, _affine_error(columns, found, max_code)
    for _ in range(_REFINEMENTS):
        found = _refine_affine(columns, found, max_code, max_scale)
        error = _affine_error(columns, found, max_code)
        is_better = error < best_error
        best_error = np.where(is_better, error, best_error)
        best = _AffineScales(*_select(is_better, found, best))
    codes = _affine_codes(columns.x, *best.effective(), max_code)
    return Grid(best.d, best.scales, best.dmin, best.mins), _from_columns(codes)


def search_symmetric(
    blocks: FloatArray,
    *,
    sub_block: int,
    half_codes: int,
    half_scales: int,
    importance: FloatArray | None = None,
) -> tuple[Grid, CodeArray]:
    """Best codes and scales in -half..half - 1 for `blocks` [n, S * B]."""
    columns = _Columns.split(blocks, sub_block, importance)
    scale = _fit_symmetric(columns, half_codes)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(1, keepdims=True), axis=1)
    d = as_half(largest[:, 0] / np.float32(-half_scales))
    scales = _clip_round(scale * reciprocal(d)[:, None], -half_scales, half_scales - 1)
    best, best_error = (d, scales), _symmetric_error(columns, d, scales, half_codes)
    for _ in range(_REFINEMENTS):
        d, scales = _refine_symmetric(columns, d, scales, half_codes, half_scales)
        error = _symmetric_error(columns, d, scales, half_codes)
        is_better = error < best_error
        best_error = np.where(is_better, error, best_error)
        best = (
            np.where(is_better, d, best[0]),
            np.where(is_better[:, None], scales, best[1]),
        )
    d, scales = best
    codes = _symmetric_codes(columns.x, d[:, None] * scales, half_codes)
    return Grid(d, scales), _from_columns(codes)


def search_scale(
    blocks: FloatArray, *, half_codes: int, importance: FloatArray | None = None
) -> FloatArray:
    """Scale [n, 1], signed, of least error with codes -half..half - 1 for `blocks` [n, B]."""
    return _fit_symmetric(_Columns.split(blocks, blocks.shape[1], importance), half_codes)


def _fit_affine(columns: _Columns, max_code: int) -> tuple[FloatArray, FloatArray]:
    """Unquantised (scale, minimum >= 0) of every sub-block [n, S]."""
    low = np.minimum(columns.x.min(axis=0), 0)
    high = np.maximum(columns.x.max(axis=0), low)
    best_scale, best_minimum = (high - low) / np.float32(max_code), -low
    best_error = np.full_like(low, np.inf)
    for start in _AFFINE_STARTS:
        scale, minimum = (high - low) / np.float32(max_code + start), -low
        for _ in range(2):
            sums = _sums(columns, _affine_codes(columns.x, scale, minimum, max_code))
            scale, minimum = _solve_affine(columns, sums)
        error = _affine_gain(columns, sums, scale, minimum)
        is_better = error < best_error
        best_error = np.where(is_better, error, best_error)
        best_scale, best_minimum = _select(is_better, (scale, minimum), (best_scale, best_minimum))
    return best_scale, best_minimum


def _solve_affine(columns: _Columns, sums: _Sums) -> tuple[FloatArray, FloatArray]:
    """Least squares of x ~ a q - b, with b >= 0 and a >= 0."""
    determinant = columns.total * sums.qq - sums.q * sums.q
    scale = (columns.total * sums.xq - columns.x_sum * sums.q) * reciprocal(determinant)
    minimum = (scale * sums.q - columns.x_sum) / columns.total
    is_below = minimum < 0
    scale = np.where(is_below, sums.xq * reciprocal(sums.qq), scale)
    return np.maximum(scale, 0), np.maximum(minimum, 0)


def _affine_gain(
    columns: _Columns, sums: _Sums, scale: FloatArray, minimum: FloatArray
) -> FloatArray:
    """Squared error of x ~ a q - b, less the constant sum of x^2."""
    gain: FloatArray = scale * (scale * sums.qq - 2 * sums.xq - 2 * minimum * sums.q) + minimum * (
        columns.total * minimum + 2 * columns.x_sum
    )
    return gain


def _quantise_affine(scale: FloatArray, minimum: FloatArray, max_scale: int) -> _AffineScales:
    d = as_half(scale.max(axis=1) / np.float32(max_scale))
    dmin = as_half(minimum.max(axis=1) / np.float32(max_scale))
    scales = _clip_round(scale * reciprocal(d)[:, None], 0, max_scale)
    mins = _clip_round(minimum * reciprocal(dmin)[:, None], 0, max_scale)
    return _AffineScales(d, dmin, scales, mins)


def _refine_affine(
    columns: _Columns, found: _AffineScales, max_code: int, max_scale: int
) -> _AffineScales:
    """One round: scales and mins by least squares for the present codes, then d and dmin."""
    total, x_sum = columns.total, columns.x_sum
    sums = _sums(columns, _affine_codes(columns.x, *found.effective(), max_code))
    scale, minimum = found.effective()
    scale = (sums.xq + minimum * sums.q) * reciprocal(sums.qq)
    scales = _clip_round(scale * reciprocal(found.d)[:, None], 0, max_scale)
    minimum = (found.d[:, None] * scales * sums.q - x_sum) / total
    mins = _clip_round(minimum * reciprocal(found.dmin)[:, None], 0, max_scale)
    # normal equations of x ~ d (scale q) - dmin (min), over the whole super-block
    a11 = (scales * scales * sums.qq).sum(axis=1)
    a12 = (scales * mins * sums.q).sum(axis=1)
    a22 = (total * mins * mins).sum(axis=1)
    r1, r2 = (scales * sums.xq).sum(axis=1), (mins * x_sum).sum(axis=1)
    inverse = reciprocal(a11 * a22 - a12 * a12)
    d, dmin = (r1 * a22 - r2 * a12) * inverse, (r1 * a12 - r2 * a11) * inverse
    is_usable = (inverse > 0) & (d > 0) & (dmin > 0)
    d, dmin = np.where(is_usable, d, found.d), np.where(is_usable, dmin, found.dmin)
    return _AffineScales(as_half(d), as_half(dmin), scales, mins)


def _affine_codes(
    columns: FloatArray, scale: FloatArray, minimum: FloatArray, max_code: int
) -> FloatArray:
    """Nearest codes [B, n, S], as float32."""
    codes: FloatArray = columns + minimum
    codes *= reciprocal(scale)
    np.rint(codes, out=codes)
    np.clip(codes, 0, max_code, out=codes)
    return codes


def _affine_error(columns: _Columns, found: _AffineScales, max_code: int) -> FloatArray:
    """Squared error of every super-block [n]."""
    scale, minimum = found.effective()
    residual = _affine_codes(columns.x, scale, minimum, max_code)
    residual *= scale
    residual -= minimum
    residual -= columns.x
    error: FloatArray = np.einsum("bns,bns->n", columns.weigh(residual), residual)
    return error


def _fit_symmetric(columns: _Columns, half_codes: int) -> FloatArray:
    """Unquantised signed scale of every sub-block [n, S]."""
    high, low = columns.x.max(axis=0), columns.x.min(axis=0)
    largest = np.where(high > -low, high, low)
    best_scale: FloatArray = largest / np.float32(-half_codes)
    best_gain = np.zeros_like(largest)
    for start in _SYMMETRIC_STARTS:
        for sign in (-1, 1):  # the extra code -half_codes on the larger side, or on the other
            reach = half_codes if sign < 0 else half_codes - 1
            scale = largest / np.float32(sign * (reach + start))
            for _ in range(2):
                sums = _sums(columns, _symmetric_codes(columns.x, scale, half_codes))
                scale = sums.xq * reciprocal(sums.qq)
            gain = sums.xq * scale
            is_better = gain > best_gain
            best_gain = np.where(is_better, gain, best_gain)
            best_scale = np.where(is_better, scale, best_scale)
    return best_scale


def _refine_symmetric(
    columns: _Columns, d: FloatArray, scales: FloatArray, half_codes: int, half_scales: int
) -> tuple[FloatArray, FloatArray]:
    """One round: scales by least squares for the present codes, then d over the super-block."""
    sums = _sums(columns, _symmetric_codes(columns.x, d[:, None] * scales, half_codes))
    scale = sums.xq * reciprocal(sums.qq)
    scales = _clip_round(scale * reciprocal(d)[:, None], -half_scales, half_scales - 1)
    norm = (scales * scales * sums.qq).sum(axis=1)
    refined = (scales * sums.xq).sum(axis=1) * reciprocal(norm)
    return as_half(np.where(norm > 0, refined, d)), scales


def _symmetric_codes(columns: FloatArray, scale: FloatArray, half_codes: int) -> FloatArray:
    codes: FloatArray = columns * reciprocal(scale)
    np.rint(codes, out=codes)
    np.clip(codes, -half_codes, half_codes - 1, out=codes)
    return codes


def _symmetric_error(
    columns: _Columns, d: FloatArray, scales: FloatArray, half_codes: int
) -> FloatArray:
    scale = d[:, None] * scales
    residual = _symmetric_codes(columns.x, scale, half_codes)
    residual *= scale
    residual -= columns.x
    error: FloatArray = np.einsum("bns,bns->n", columns.weigh(residual), residual)
    return error


def _sums(columns: _Columns, codes: FloatArray) -> _Sums:
    weighted = columns.weigh(codes)
    return _Sums(
        weighted.sum(axis=0),
        np.einsum("bns,bns->ns", weighted, codes),
        np.einsum("bns,bns->ns", columns.x, weighted),
    )


def _clip_round(values: FloatArray, low: int, high: int) -> FloatArray:
    return np.clip(np.rint(values), low, high)


def _select(
    is_first: npt.NDArray[np.bool_],
    first: tuple[FloatArray, ...],
    second: tuple[FloatArray, ...],
) -> tuple[FloatArray, ...]:
    """Element-wise choice; a [n] mask also chooses whole rows of [n, S]."""
    return tuple(
        np.where(is_first if a.ndim == is_first.ndim else is_first[:, None], a, b)
        for a, b in zip(first, second, strict=True)
    )


def _from_columns(codes: FloatArray) -> CodeArray:
    """[B, n, S] -> [n, S * B]."""
    return codes.transpose(1, 2, 0).reshape(codes.shape[1], -1).astype(np.int8)
