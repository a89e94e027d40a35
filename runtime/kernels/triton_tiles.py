"""What Triton's kernels of few and of many tokens do alike with a tile of outputs.

Importing this module needs triton (extra `cuda`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from edge_moe.runtime.kernels.triton_forms import row_bytes


@triton.jit
def matrix_rows(
    tile: tl.tensor, NUM_ROWS: tl.constexpr, IS_GATED: tl.constexpr, TILE_ROWS: tl.constexpr
) -> tl.tensor:
    """Rows of the matrix that a tile of outputs needs; those of gate_proj and up_proj take turns.

    Rows beyond the matrix become its last one, which is read but not written.
    """
    if IS_GATED:
        turn = tl.arange(0, 2 * TILE_ROWS)
        row = tl.minimum(tile * TILE_ROWS + turn // 2, NUM_ROWS - 1) + turn % 2 * NUM_ROWS
    else:
        row = tl.minimum(tile * TILE_ROWS + tl.arange(0, TILE_ROWS), NUM_ROWS - 1)
    return row


@triton.jit
def row_pointers(
    address: tl.tensor, row: tl.tensor, WIDTH: tl.constexpr, FORM: tl.constexpr
) -> tl.tensor:
    """uint8 pointers to where rows [N] of a matrix start, even."""
    start = address + row.to(tl.int64) * row_bytes(FORM, WIDTH)
    return tl.multiple_of(start.to(tl.pointer_type(tl.uint8)), [2])


@triton.jit
def store_products(
    places: tl.tensor, products: tl.tensor, is_inside: tl.tensor, IS_GATED: tl.constexpr
) -> None:
    """Write products with `matrix_rows`, [..., N], to pointers [..., N] as far as `is_inside` says.

    With IS_GATED they are [..., 2N], and what is written is silu(gate x) * (up x).
    """
    if IS_GATED:
        gate, up = tl.split(products.reshape(places.shape + (2,)))
        products = gate * tl.sigmoid(gate) * up
    tl.store(places, products.to(places.dtype.element_ty), mask=is_inside)
