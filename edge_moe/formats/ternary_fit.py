"""Other scales for ternary blocks than the least squares of `edge_moe.formats.ternary`.

absmean is BitNet's rule (arXiv:2402.17764), for weights that were trained with it. The refit is
PT2-LLM's activation-aware grid alignment (arXiv:2510.03267): the trits stay as they are, since
choosing them again by the same activations fits the calibration text and not the task, and the
scales solve the normal equations of the output error. The paper has a mean mu beside the scale and
blocks of 128, which ggml's ternary blocks cannot hold, and aligns one block at a time; here all
blocks of a row are solved together.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_moe.formats.base import FloatArray
from edge_moe.formats.grid import CodeArray, Grid
from edge_moe.formats.scales import as_half, reciprocal

REFIT_DAMPING = 0.01
"""Added to the second moments, as a share of their mean; draws scales towards least squares."""
_REFIT_ROWS = 128  # rows solved at a time


def absmean(blocks: FloatArray) -> tuple[Grid, CodeArray]:
    """d = mean |w|, trits = w / d rounded and clipped, for `blocks` [n, B]."""
    scale = np.abs(blocks).mean(axis=1, keepdims=True)
    trits = np.rint(blocks * reciprocal(as_half(scale))).clip(-1, 1).astype(np.int8)
    return Grid(scale[:, 0], np.ones_like(scale)), trits


def refit_by_squares(
    weights: FloatArray, codes: CodeArray, block: int, squares: FloatArray
) -> FloatArray:
    """Scales [rows, blocks] minimising sum_j m_j (w_j - d q_j)^2 in each block of `block` columns.

    weights and codes [rows, width]; squares m [width] second moments of the input.
    """
    mean = float(squares.mean(dtype=np.float64))
    damped = (squares / mean if mean > 0 else np.zeros_like(squares)) + REFIT_DAMPING
    shape = (len(weights), -1, block)
    levels = codes.reshape(shape).astype(np.float64)
    moment = damped.astype(np.float64).reshape(1, -1, block)
    norm = np.einsum("rbj,rbj->rb", moment * levels, levels)
    dot = np.einsum("rbj,rbj->rb", moment * levels, weights.reshape(shape))
    scale: FloatArray = np.divide(dot, norm, out=np.zeros_like(dot), where=norm > 0).astype(
        np.float32
    )
    return scale


def refit_by_hessian(
    weights: FloatArray, codes: CodeArray, block: int, hessian: npt.NDArray[np.floating]
) -> FloatArray:
    """Scales [rows, blocks] minimising (w - q)^T H (w - q) of each row, q = d_b codes in block b.

    hessian [width, width]. Memory: two copies of it in float64, and 128 rows of work.
    """
    damped = hessian.astype(np.float64)
    diagonal = np.diag_indices_from(damped)
    mean = float(damped[diagonal].mean())
    damped[diagonal] += REFIT_DAMPING * mean if mean > 0 else 1.0
    scales = [
        _solve_rows(weights[rows], codes[rows].astype(np.float64), block, damped)
        for rows in (slice(at, at + _REFIT_ROWS) for at in range(0, len(weights), _REFIT_ROWS))
    ]
    return np.concatenate(scales).astype(np.float32)


def _solve_rows(
    weights: FloatArray,
    levels: npt.NDArray[np.float64],
    block: int,
    hessian: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Normal equations: sum_c (t_b^T H t_c) d_c = t_b^T H w for every block b; [rows, blocks]."""
    rows, width = weights.shape
    num_blocks = width // block
    split = levels.reshape(rows, num_blocks, block)
    matrix = np.empty((rows, num_blocks, num_blocks))
    right = np.empty((rows, num_blocks))
    for index in range(num_blocks):
        image = split[:, index] @ hessian[index * block : (index + 1) * block]  # t_b^T H
        right[:, index] = np.einsum("rj,rj->r", image, weights)
        matrix[:, index] = np.einsum("rbj,rbj->rb", image.reshape(split.shape), split)
    is_empty = ~split.any(axis=2)  # a block of zeros: any scale does
    matrix[:, np.arange(num_blocks), np.arange(num_blocks)] += is_empty
    solution: npt.NDArray[np.float64] = np.linalg.solve(matrix, right[..., None])[..., 0]
    return solution
