"""Triton kernel for few tokens: each pair of a token and an expert takes its own dot products.

Letters: R pairs, N rows of a matrix, W its width. Grid: (R, N / TILE_ROWS). A program reads its
rows of one expert once, as they are packed, and the token's input from the cache.

Bound: the packed bytes of the R matrices over the device's memory bandwidth; inputs, outputs and
the table are less than 1 % of them at the widths of today's models. See
`benchmarks/triton_kernels.py`, which prints the distance from it.
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

STEP_BYTES = 128
"""Of a row, read at once."""
NUM_WARPS = 4


def decode(
    inputs: Tensor,
    table: Tensor,
    outputs: Tensor,
    *,
    width: int,
    forms: tuple[str, ...],
    is_gated: bool,
    tile_rows: int,
    step_bytes: int = STEP_BYTES,
) -> None:
    """Products of inputs with packed matrices; every pair names its matrix and its form.

    Args:
        inputs: float [T, W], contiguous.
        table: int64 [3, R]: row of `inputs`, address of the matrix's first byte (even, on the
            inputs' device), position of its type in `forms`.
        outputs: float [R, N], contiguous; overwritten.
        width: W.
        forms: types that `table` names, of `triton_forms.TRITON_FORMS`.
        is_gated: the matrix is gate_proj over up_proj, [2N, W]: give silu(gate x) * (up x).
        tile_rows: outputs of a program, a power of two.
        step_bytes: bytes of a row that are read at once, a power of two from 32 on.
    """
    num_pairs, num_rows = outputs.shape
    grid = (num_pairs, triton.cdiv(num_rows, tile_rows))
    decode_kernel[grid](
        *(inputs, table, outputs, num_pairs),
        NUM_ROWS=num_rows,
        WIDTH=width,
        FORMS=forms,
        IS_GATED=is_gated,
        TILE_ROWS=tile_rows,
        STEP_BYTES=step_bytes,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


@triton.jit
def decode_kernel(
    inputs: tl.tensor,
    table: tl.tensor,
    outputs: tl.tensor,
    num_pairs: tl.tensor,
    NUM_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FORMS: tl.constexpr,
    IS_GATED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    STEP_BYTES: tl.constexpr,
) -> None:
    """See `decode`."""
    pair = tl.program_id(0).to(tl.int64)
    token = tl.load(table + pair)
    address = tl.load(table + num_pairs + pair)
    number = tl.load(table + 2 * num_pairs + pair)
    asked = matrix_rows(tl.program_id(1), NUM_ROWS, IS_GATED, TILE_ROWS)
    products = tl.zeros(asked.shape, tl.float32)
    for position in tl.static_range(len(FORMS)):
        if number == position:
            products = _dots(
                inputs + token * WIDTH, address, asked, WIDTH, FORMS[position], STEP_BYTES
            )
    row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    store_products(outputs + pair * NUM_ROWS + row, products, row < NUM_ROWS, IS_GATED)


@triton.jit
def _dots(
    inputs: tl.tensor,
    address: tl.tensor,
    row: tl.tensor,
    WIDTH: tl.constexpr,
    FORM: tl.constexpr,
    STEP_BYTES: tl.constexpr,
) -> tl.tensor:
    """float32 [N] dot products of one input with rows [N] of a matrix."""
    CHUNK: tl.constexpr = chunk_bytes(FORM)
    STEP: tl.constexpr = STEP_BYTES // CHUNK
    rows = row_pointers(address, row, WIDTH, FORM)[:, None, None]
    byte = tl.arange(0, CHUNK)[None, None, :]
    total = tl.zeros([row.shape[0], STEP, CHUNK], tl.float32)
    for first in range(0, num_chunks(FORM, WIDTH), STEP):
        chunk = first + tl.arange(0, STEP)[None, :, None]
        for plane in tl.static_range(num_planes(FORM)):
            column = columns(chunk, byte, WIDTH, FORM, plane)
            values = tl.load(inputs + column, mask=column < WIDTH, other=0.0).to(tl.float32)
            total += weights(rows, chunk, byte, WIDTH, FORM, plane) * values
    return tl.sum(tl.sum(total, axis=2), axis=1)
