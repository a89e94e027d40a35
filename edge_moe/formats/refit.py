"""d and dmin of packed blocks solved again for least error of the matrix's output, codes kept.

PT2-LLM's activation-aware grid alignment (arXiv:2510.03267): the codes stay, since choosing them
again by the same activations fits the calibration text and not the task, and the scales solve the
normal equations of the output error. Where this differs from the paper: it has ternary blocks of
128 with a mean mu beside the scale, which ggml's ternary blocks cannot hold, and aligns one block
at a time; here every ggml block form is served, and all blocks of a row are solved together.

Letters: R rows, K blocks in a row, B weights in a block, P terms of a block's values (d's, dmin's).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_moe.formats.base import FloatArray
from edge_moe.formats.grid import CodeArray, Grid
from edge_moe.formats.scales import as_half

REFIT_DAMPING = 0.01
"""Added to the second moments, as a share of their mean; draws scales towards least squares."""
_RIDGE = 1e-6  # of a term's own norm: decides between terms that are multiples of each other
_ROWS = 128  # solved at a time

FloatArray64 = npt.NDArray[np.float64]


def refit_by_hessian(
    weights: FloatArray, grid: Grid, codes: CodeArray, hessian: npt.NDArray[np.floating]
) -> Grid:
    """`grid` with d and dmin that minimise (w - q)^T H (w - q) of each row.

    weights and codes [R, K B], hessian [K B, K B]; grid of R K blocks, row by row. A row keeps its
    scales where rounding to fp16 leaves the new ones worse. Memory: the hessian in float64, and
    128 rows of work: 128 x (8 P (K B) + 8 (P K)^2) bytes.
    """
    damped = hessian.astype(np.float64)
    diagonal = np.diag_indices_from(damped)
    damped[diagonal] += _damping(damped[diagonal])
    return _refit(weights, grid, codes, damped)


def refit_by_squares(
    weights: FloatArray, grid: Grid, codes: CodeArray, squares: npt.NDArray[np.floating]
) -> Grid:
    """The same for inputs that are taken as uncorrelated: `squares` [K B] is H's diagonal."""
    damped = squares.astype(np.float64)
    return _refit(weights, grid, codes, damped + _damping(damped))


def _damping(squares: FloatArray64) -> float:
    mean = float(squares.mean())
    return REFIT_DAMPING * mean if mean > 0 else 1.0


def _refit(weights: FloatArray, grid: Grid, codes: CodeArray, moments: FloatArray64) -> Grid:
    """`moments` [K B, K B], or [K B] for a diagonal."""
    num_rows = len(weights)
    old = _coefficients(grid, num_rows)
    num_blocks = old.shape[2]
    new = np.empty_like(old)
    for start in range(0, num_rows, _ROWS):
        rows = slice(start, start + _ROWS)
        blocks = slice(start * num_blocks, (start + _ROWS) * num_blocks)
        terms = _terms(grid.part(blocks), codes[rows], num_blocks)
        wide = weights[rows].astype(np.float64)
        solve = _solve_all if moments.ndim == 2 else _solve_each
        new[rows] = solve(terms, wide, moments, old[rows])
    return grid.with_scales(
        *(np.ascontiguousarray(new[:, p]).reshape(-1) for p in range(len(new[0])))
    )


def _coefficients(grid: Grid, num_rows: int) -> FloatArray:
    """[R, P, K] d and, where the form has one, dmin."""
    parts = [grid.d] if grid.dmin is None else [grid.d, grid.dmin]
    return as_half(np.stack([part.reshape(num_rows, -1) for part in parts], axis=1))


def _terms(grid: Grid, codes: CodeArray, num_blocks: int) -> FloatArray64:
    """[R, P, K, B]: what d and dmin are multiplied with."""
    shape = (len(codes), num_blocks, -1)
    split = codes.reshape(*grid.scales.shape, -1).astype(np.float64)
    parts: list[FloatArray64] = [(grid.scales[:, :, None] * split).reshape(shape)]
    if grid.mins is not None:
        mins = grid.mins.astype(np.float64)
        parts.append(np.repeat(-mins, split.shape[2], axis=1).reshape(shape))
    return np.stack(parts, axis=1)


def _solve_all(
    terms: FloatArray64, weights: FloatArray64, hessian: FloatArray64, old: FloatArray
) -> FloatArray:
    """sum_c (t_b^T H t_c) d_c = t_b^T H w for every term b of a row: [R, P, K]."""
    rows, num_terms, num_blocks, block = terms.shape
    matrix = np.empty((rows, num_terms, num_blocks, num_terms, num_blocks))
    right = np.empty((rows, num_terms, num_blocks))
    for term in range(num_terms):
        for index in range(num_blocks):
            image = terms[:, term, index] @ hessian[index * block : (index + 1) * block]  # t^T H
            right[:, term, index] = np.einsum("rj,rj->r", image, weights)
            split = image.reshape(rows, num_blocks, block)
            matrix[:, term, index] = np.einsum("rkj,rpkj->rpk", split, terms)
    size = num_terms * num_blocks
    flat = matrix.reshape(rows, size, size), right.reshape(rows, size), old.reshape(rows, size)
    return _best(*flat).reshape(old.shape)


def _solve_each(
    terms: FloatArray64, weights: FloatArray64, squares: FloatArray64, old: FloatArray
) -> FloatArray:
    """The same for a diagonal H, where every block stands alone: [R, P, K]."""
    rows, num_terms, num_blocks, block = terms.shape
    weighted = terms * squares.reshape(num_blocks, block)
    matrix = np.einsum("rpkj,rqkj->rkpq", weighted, terms)
    right = np.einsum("rpkj,rkj->rkp", weighted, weights.reshape(rows, num_blocks, block))
    flat = (
        matrix.reshape(-1, num_terms, num_terms),
        right.reshape(-1, num_terms),
        old.transpose(0, 2, 1).reshape(-1, num_terms),
    )
    return _best(*flat).reshape(rows, num_blocks, num_terms).transpose(0, 2, 1)


def _best(matrix: FloatArray64, right: FloatArray64, old: FloatArray) -> FloatArray:
    """Solutions [n, s] of `matrix` [n, s, s] as fp16 holds them, or `old` where that is better.

    The loss of coefficients c is c^T M c - 2 r^T c and a constant.
    """
    position = np.arange(matrix.shape[1])
    diagonal = matrix[:, position, position]
    ridged = matrix.copy()
    ridged[:, position, position] += np.where(diagonal > 0, _RIDGE * diagonal, 1)
    found = as_half(np.linalg.solve(ridged, right[..., None])[..., 0].astype(np.float32))
    found = np.where(np.isfinite(found), found, old)

    def loss(values: FloatArray) -> FloatArray64:
        image = (matrix @ values[..., None].astype(np.float64))[..., 0]
        total: FloatArray64 = ((image - 2 * right) * values).sum(axis=1)
        return total

    is_better = loss(found) < loss(old)
    return np.where(is_better[:, None], found, old)
