"""Triton kernel for many tokens: an expert's weights are unpacked once for a tile of its tokens.

A grouped matrix product: pairs of a token and an expert are sorted by expert, and cut into tiles
that never hold two experts. Letters: R pairs, N rows of a matrix, W its width, M = TILE_PAIRS.
Grid: (tiles, N / TILE_ROWS). Products are summed in float32; weights are rounded to the inputs'
type before they are multiplied, as where they are unpacked to it.

Bound: the larger of 2 R N W operations over the rate of the device's matrix units, and the packed
bytes of the matrices over its memory bandwidth. Unpacking costs every tile N W conversions, so
tiles of few pairs stay far from the first. See `benchmarks/triton_kernels.py`.
Importing this module needs triton (extra `cuda`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from edge_moe.runtime.kernels.triton_forms import (
    chunk_bytes,
    columns,
    num_chunks,
    num_planes,
    weights,
)
from edge_moe.runtime.kernels.triton_tiles import matrix_rows, row_pointers, store_products

Tensor = torch.Tensor

STEP_BYTES = 32
"""Of a row, read at once. Larger steps, more stages or fewer warps run out of registers."""
NUM_WARPS, NUM_STAGES = 8, 2


def prefill(
    inputs: Tensor,
    tokens: Tensor,
    tiles: Tensor,
    outputs: Tensor,
    *,
    width: int,
    forms: tuple[str, ...],
    is_gated: bool,
    tile_pairs: int,
    tile_rows: int,
    step_bytes: int = STEP_BYTES,
) -> None:
    """Products of inputs with packed matrices, for pairs that are sorted by matrix.

    Args:
        inputs: float [T, W], contiguous.
        tokens: int64 [R], row of `inputs` of each pair.
        tiles: int64 [4, tiles]: first pair, pair after the last (at most `tile_pairs` further on),
            address of the matrix's first byte (even), position of its type in `forms`.
        outputs: float [R, N], contiguous; overwritten.
        width: W.
        forms: types that `tiles` names, of `triton_forms.TRITON_FORMS`.
        is_gated: the matrix is gate_proj over up_proj, [2N, W]: give silu(gate x) * (up x).
        tile_pairs, tile_rows: outputs of a program, powers of two from 16 on.
        step_bytes: bytes of a row that are read at once, a power of two from 32 on.
    """
    num_tiles, num_rows = tiles.shape[1], outputs.shape[1]
    grid = (num_tiles, triton.cdiv(num_rows, tile_rows))
    prefill_kernel[grid](
        *(inputs, tokens, tiles, outputs, num_tiles),
        NUM_ROWS=num_rows,
        WIDTH=width,
        FORMS=forms,
        IS_GATED=is_gated,
        TILE_PAIRS=tile_pairs,
        TILE_ROWS=tile_rows,
        STEP_BYTES=step_bytes,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        enable_fp_fusion=True,
    )


@triton.jit
def prefill_kernel(
    inputs: tl.tensor,
    tokens: tl.tensor,
    tiles: tl.tensor,
    outputs: tl.tensor,
    num_tiles: tl.tensor,
    NUM_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FORMS: tl.constexpr,
    IS_GATED: tl.constexpr,
    TILE_PAIRS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    STEP_BYTES: tl.constexpr,
) -> None:
    """See `prefill`."""
    tile = tl.program_id(0)
    pair = tl.load(tiles + tile) + tl.arange(0, TILE_PAIRS)
    is_pair = pair < tl.load(tiles + num_tiles + tile)
    address = tl.load(tiles + 2 * num_tiles + tile)
    number = tl.load(tiles + 3 * num_tiles + tile)
    token = tl.load(tokens + pair, mask=is_pair, other=0)
    lines = inputs + token[:, None] * WIDTH
    asked = matrix_rows(tl.program_id(1), NUM_ROWS, IS_GATED, TILE_ROWS)
    products = tl.zeros([TILE_PAIRS, asked.shape[0]], tl.float32)
    for position in tl.static_range(len(FORMS)):
        if number == position:
            products = _products(lines, is_pair, address, asked, WIDTH, FORMS[position], STEP_BYTES)
    row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    places = outputs + pair[:, None] * NUM_ROWS + row[None, :]
    is_inside = is_pair[:, None] & (row < NUM_ROWS)[None, :]
    store_products(places, products, is_inside, IS_GATED)


@triton.jit
def _products(
    lines: tl.tensor,
    is_pair: tl.tensor,
    address: tl.tensor,
    row: tl.tensor,
    WIDTH: tl.constexpr,
    FORM: tl.constexpr,
    STEP_BYTES: tl.constexpr,
) -> tl.tensor:
    """float32 [M, N] of inputs, whose lines start at [M, 1], with rows [N] of a matrix."""
    CHUNK: tl.constexpr = chunk_bytes(FORM)
    STEP: tl.constexpr = STEP_BYTES // CHUNK
    rows = row_pointers(address, row, WIDTH, FORM)[:, None, None]
    byte = tl.arange(0, CHUNK)[None, None, :]
    flat = tl.arange(0, STEP_BYTES)
    total = tl.zeros([lines.shape[0], row.shape[0]], tl.float32)
    for first in range(0, num_chunks(FORM, WIDTH), STEP):
        chunk = first + tl.arange(0, STEP)[None, :, None]
        for plane in tl.static_range(num_planes(FORM)):
            column = columns(first + flat // CHUNK, flat % CHUNK, WIDTH, FORM, plane)[None, :]
            is_inside = is_pair[:, None] & (column < WIDTH)
            values = tl.load(lines + column, mask=is_inside, other=0.0)
            matrix = weights(rows, chunk, byte, WIDTH, FORM, plane)
            matrix = matrix.reshape(row.shape[0], STEP_BYTES).to(values.dtype)
            total = tl.dot(values, tl.trans(matrix), total, input_precision="ieee")
    return total
