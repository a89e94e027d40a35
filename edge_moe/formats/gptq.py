"""GPTQ onto ggml's block grids: round column by column, and let later columns make up the error.

With H the second moments of a matrix's input, what is minimised is tr((W - Q) H (W - Q)^T), the
squared error of the output (GPTQ, arXiv:2210.17323). Three things differ from the paper's code: a
grid's scales and minima come from the block's own search on the residual weights when the block is
reached, each column weighted as GPTQ weighs its error; columns keep their order, since a block's
scale belongs to neighbours; an input that was never seen keeps its weights, rounded, not zero; and
damping grows as tokens get few beside the width, as they do for most experts.

Memory for rows of n weights: 16 n^2 bytes while H is factored, then 4 n^2; 9 bytes per weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import lapack

from edge_moe.formats.base import ByteArray, FloatArray
from edge_moe.formats.blocks import BlockForm, require_weights
from edge_moe.formats.grid import CodeArray, Grid
from edge_moe.formats.refit import refit_by_hessian
from edge_moe.formats.scales import reciprocal
from edge_moe.formats.ternary import TernaryForm

DAMPING_SHARE = 0.01
"""Added to H's diagonal, as a share of its mean, where tokens are plenty: the paper's value."""
_DAMPING_PER_RANK = 0.3  # times width / tokens
_DAMPING_RISES = (1, 3, 10)  # until H can be inverted
_LAZY_COLUMNS = 32  # error reaches later columns this many at a time; divides every block


@dataclass(frozen=True)
class InverseFactor:
    """Upper triangular U with U^T U = (H + damping)^-1."""

    upper: FloatArray
    """[n, n] float32."""
    damping: float
    """Share of H's mean diagonal that was added."""

    def importance(self) -> FloatArray:
        """[n] weight of the squared error made in each column: 1 / U_jj^2."""
        diagonal = np.diagonal(self.upper).astype(np.float64)
        return (1 / diagonal**2).astype(np.float32)


def damping_shares(width: int, num_tokens: int | None) -> tuple[float, ...]:
    """Dampings to try for the moments of `num_tokens` inputs of `width` numbers; None is plenty.

    0.01 (the paper's) fits an estimate of full rank many times over. Held-out output errors of the
    demo model's experts (width 256) were least with 0.1 for 970 tokens, 0.3 for 256 and 512, 1 for
    128 and 3 for 32, for ternary, 2 and 4 bits alike: 0.3 width / tokens. With 0.01 and 128 tokens
    GPTQ is worse than rounding to nearest.
    """
    first = DAMPING_SHARE
    if num_tokens is not None:
        first = max(first, _DAMPING_PER_RANK * width / max(num_tokens, 1))
    return tuple(first * rise for rise in _DAMPING_RISES)


def factor_inverse(
    hessian: npt.NDArray[np.floating], num_tokens: int | None = None
) -> InverseFactor | None:
    """The factor of `hessian` [n, n] with the first of its dampings that works; None if none does.

    With J the reversal of order, J H J = L L^T makes R = J L J upper and H = R R^T: U = R^-1.
    """
    return damped_factor(hessian, damping_shares(len(hessian), num_tokens))


def damped_factor(
    hessian: npt.NDArray[np.floating], dampings: Sequence[float]
) -> InverseFactor | None:
    """`factor_inverse` with dampings of one's own."""
    mean = float(np.diagonal(hessian).mean(dtype=np.float64))
    if not (mean > 0 and np.isfinite(mean)):
        return None
    for damping in dampings:
        matrix = np.array(hessian[::-1, ::-1], dtype=np.float64, order="F")
        matrix[np.diag_indices_from(matrix)] += damping * mean
        lower, info = lapack.dpotrf(matrix, lower=1, clean=1, overwrite_a=1)
        if info:
            continue
        inverse, info = lapack.dtrtri(lower, lower=1, overwrite_c=1)
        if not info and np.isfinite(inverse).all():
            return InverseFactor(np.ascontiguousarray(inverse[::-1, ::-1], np.float32), damping)
    return None


def gptq_pack(form: BlockForm, weights: FloatArray, factor: InverseFactor) -> ByteArray:
    """`weights` [rows, width] packed with error feedback: [rows, row_bytes]."""
    return _join(form, *_round(form, weights, factor, None))


def gptq_refit_pack(
    form: BlockForm,
    weights: FloatArray,
    factor: InverseFactor,
    hessian: npt.NDArray[np.floating],
) -> ByteArray:
    """`gptq_pack`, then d and dmin of all blocks of a row solved together for least output error.

    Error feedback alone lets the scales of coarse blocks drift: on held-out text of the demo model
    the refit takes 57 % of the error away for ternary, 24 % for q2_k, 2 % for q4_k. Ternary forms
    are rounded once more on the grid that was found, which is a tenth of that.
    """
    grid, codes = _round(form, weights, factor, None)
    grid = refit_by_hessian(weights, grid, codes, hessian)
    if isinstance(form, TernaryForm):
        grid, codes = _round(form, weights, factor, grid)
        grid = refit_by_hessian(weights, grid, codes, hessian)
    return _join(form, grid, codes)


def _join(form: BlockForm, grid: Grid, codes: CodeArray) -> ByteArray:
    """Grid of rows x blocks and codes [rows, width] -> [rows, row_bytes]."""
    return form.join(grid, codes.reshape(-1, form.block_size)).reshape(len(codes), -1)


def _round(
    form: BlockForm, weights: FloatArray, factor: InverseFactor, known: Grid | None
) -> tuple[Grid, CodeArray]:
    """Grid, row by row, and codes [rows, width]; the grid is `known`, or searched on the way."""
    form.row_bytes(weights.shape[1])
    require_weights(form, weights)
    residual = np.array(weights.T, dtype=np.float32, order="C")  # [width, rows]
    importance = factor.importance()
    num_blocks = len(residual) // form.block_size
    grids, codes = [], []
    for index in range(num_blocks):
        start = index * form.block_size
        columns = slice(start, start + form.block_size)
        if known is None:
            grid, _ = form.fit_all(residual[columns].T, importance[columns])
        else:
            grid = known.part(slice(index, None, num_blocks))
        grids.append(grid)
        codes.append(_round_block(form, residual, factor.upper, start, grid))
    return Grid.beside(grids), np.concatenate(codes, axis=1)


def output_loss(difference: FloatArray, hessian: npt.NDArray[np.floating]) -> float:
    """tr(D H D^T) of `difference` D [rows, n]: the squared error of the output, summed."""
    wide = difference.astype(np.float64)
    return float(np.einsum("rn,rn->", wide @ hessian.astype(np.float64), wide))


def _round_block(
    form: BlockForm, residual: FloatArray, upper: FloatArray, start: int, grid: Grid
) -> CodeArray:
    """Codes [rows, block] of the block at column `start`; `residual` [n, rows] takes its error."""
    step = np.ascontiguousarray(grid.step().T)  # [S, rows]
    inverse = reciprocal(step)
    offset = grid.offset()
    offsets = np.zeros_like(step) if offset is None else np.ascontiguousarray(offset.T)
    codes = np.empty((form.block_size, residual.shape[1]), dtype=np.int8)
    low, high = form.code_range
    for first in range(0, form.block_size, min(_LAZY_COLUMNS, form.block_size)):
        begin = start + first
        end = min(begin + _LAZY_COLUMNS, start + form.block_size)
        errors = np.empty((end - begin, residual.shape[1]), dtype=np.float32)
        for column in range(begin, end):
            position, current = column - start, residual[column]
            sub = position // form.sub_block
            code = np.rint((current + offsets[sub]) * inverse[sub]).clip(low, high)
            codes[position] = code
            error = (current - (code * step[sub] - offsets[sub])) / upper[column, column]
            errors[column - begin] = error
            residual[column + 1 : end] -= upper[column, column + 1 : end, None] * error
        residual[end:] -= upper[begin:end, end:].T @ errors
    return np.ascontiguousarray(codes.T)
