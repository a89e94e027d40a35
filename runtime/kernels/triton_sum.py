"""Triton kernel that adds what a token's experts give, in a fixed order: no atomic additions.

Importing this module needs triton (extra `cuda`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor

TILE_COLUMNS = 256


def add_weighted(
    outputs: Tensor, results: Tensor, places: Tensor, scales: Tensor, first: int
) -> None:
    """Add to each token the weighted results of its experts, one after another as `places` lists.

    A sum that is made in several calls, for more and more pairs, has the bits of one call's.

    Args:
        outputs: float32 [T, H], contiguous; added to.
        results: float [R, H], contiguous, of the pairs from number `first` on.
        places: int64 [T, K], numbers of each token's pairs; what `results` lacks is left out.
        scales: float32 [pairs], the weight of every pair, by its number.
    """
    num_tokens, num_columns = outputs.shape
    grid = (num_tokens, triton.cdiv(num_columns, TILE_COLUMNS))
    add_weighted_kernel[grid](
        *(outputs, results, places, scales, first, len(results), num_columns),
        TOP_K=places.shape[1],
        TILE_COLUMNS=TILE_COLUMNS,
        enable_fp_fusion=True,
    )


@triton.jit
def add_weighted_kernel(
    outputs: tl.tensor,
    results: tl.tensor,
    places: tl.tensor,
    scales: tl.tensor,
    first: tl.tensor,
    num_results: tl.tensor,
    num_columns: tl.tensor,
    TOP_K: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """See `add_weighted`."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    is_inside = column < num_columns
    total = tl.load(outputs + token * num_columns + column, mask=is_inside, other=0.0)
    for number in tl.static_range(TOP_K):
        place = tl.load(places + token * TOP_K + number)
        if (place >= first) & (place < first + num_results):
            lines = results + (place - first) * num_columns
            values = tl.load(lines + column, mask=is_inside, other=0.0).to(tl.float32)
            total += tl.load(scales + place) * values
    tl.store(outputs + token * num_columns + column, total, mask=is_inside)
