"""Packed weights inside a Triton kernel: which bytes of a row hold which weights, and their values.

A row's code bytes come in chunks, whose bytes lie side by side in one block. A byte holds a weight
in each of its planes: the low and the high nibble, say. Weights of one chunk and plane share their
scale. So a tile [rows, chunks, bytes] of bytes, read once, gives a tile of weights per plane, and
no weight moves to another thread. What a sum over the row multiplies them with lies at `columns`.

The layouts are described in `edge_moe.formats`; the reference is `edge_moe.runtime.kernels.unpack`.
Importing this module needs triton (extra `cuda`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from edge_moe.formats import get_form


class _Layout(NamedTuple):
    """How the code bytes of a block are cut."""

    weights: int
    """Per block."""
    block_bytes: int
    chunk_bytes: int
    """Side by side, with one scale per plane."""
    chunks: int
    """Per block."""
    planes: int
    """Weights in a byte."""


def _blocks(form: str, chunk_bytes: int, chunks: int, planes: int) -> _Layout:
    kind = get_form(form)
    return _Layout(kind.block_size, kind.block_bytes, chunk_bytes, chunks, planes)


_LAYOUTS = {
    "tq1_0": _blocks("tq1_0", 4, 13, 5),
    "tq2_0": _blocks("tq2_0", 32, 2, 4),
    "q2_0": _blocks("q2_0", 16, 1, 4),
    "q2_k": _blocks("q2_k", 16, 4, 4),
    "q3_k": _blocks("q3_k", 16, 4, 4),
    "q4_0": _blocks("q4_0", 16, 1, 2),
    "q4_k": _blocks("q4_k", 32, 4, 2),
    "q5_k": _blocks("q5_k", 32, 4, 2),
    "q6_k": _blocks("q6_k", 16, 8, 2),
    "q8_0": _blocks("q8_0", 32, 1, 1),
    "f16": _Layout(32, 64, 32, 1, 1),
    "bf16": _Layout(32, 64, 32, 1, 1),
}
"""The floats have no blocks: 32 of them are called one here, and a float a byte."""
TRITON_FORMS = frozenset(_LAYOUTS)
"""Types of a matrix that the kernels know."""


@triton.constexpr_function
def chunk_bytes(form: Any) -> Any:
    """Bytes of a chunk."""
    return _LAYOUTS[form].chunk_bytes


@triton.constexpr_function
def num_planes(form: Any) -> Any:
    """Weights in a byte."""
    return _LAYOUTS[form].planes


@triton.constexpr_function
def num_chunks(form: Any, width: Any) -> Any:
    """Chunks of a row of `width` weights."""
    layout = _LAYOUTS[form]
    return -(-width // layout.weights) * layout.chunks


@triton.constexpr_function
def row_bytes(form: Any, width: Any) -> Any:
    """Packed bytes of a row of `width` weights, which are whole blocks of packed forms."""
    layout = _LAYOUTS[form]
    return width * layout.block_bytes // layout.weights


@triton.constexpr_function
def block_bytes(form: Any) -> Any:
    """From one block to the next."""
    return _LAYOUTS[form].block_bytes


@triton.constexpr_function
def _chunks_per_block(form: Any) -> Any:
    return _LAYOUTS[form].chunks


@triton.jit
def columns(
    chunk: tl.tensor, byte: tl.tensor, WIDTH: tl.constexpr, FORM: tl.constexpr, PLANE: tl.constexpr
) -> tl.tensor:
    """Place in its row of the weight in `byte` of `chunk`; at or beyond WIDTH if there is none.

    Args:
        chunk, byte: integers of shapes that broadcast; bytes are counted from the chunk's first.
    """
    if FORM == "tq1_0":
        place = chunk % 13
        # bytes of 5 trits that are 32 apart, then 16 apart, and of 4 trits that are 4 apart
        third = (240 + 4 * PLANE if PLANE < 4 else WIDTH) + byte
        second = 160 + 16 * PLANE + 4 * (place - 8) + byte
        first = 32 * PLANE + 4 * place + byte
        found = chunk // 13 * 256 + tl.where(place < 8, first, tl.where(place < 12, second, third))
    elif FORM == "tq2_0":
        found = 128 * chunk + 32 * PLANE + byte
    elif FORM == "q2_0":
        found = 64 * chunk + 4 * byte + PLANE
    elif FORM == "q2_k" or FORM == "q3_k":
        found = 128 * (chunk // 2) + 32 * PLANE + 16 * (chunk % 2) + byte
    elif FORM == "q4_0":
        found = 32 * chunk + 16 * PLANE + byte
    elif FORM == "q4_k" or FORM == "q5_k":
        found = 64 * chunk + 32 * PLANE + byte
    elif FORM == "q6_k":
        found = 128 * (chunk // 4) + 64 * PLANE + 16 * (chunk % 4) + byte
    else:
        tl.static_assert(FORM == "q8_0" or FORM == "f16" or FORM == "bf16", "no kernel for a form")
        found = 32 * chunk + byte
    return found


@triton.jit
def weights(
    rows: tl.tensor,
    chunk: tl.tensor,
    byte: tl.tensor,
    WIDTH: tl.constexpr,
    FORM: tl.constexpr,
    PLANE: tl.constexpr,
) -> tl.tensor:
    """float32 [N, C, B], the weights at `columns`; of no meaning, but finite, where there are none.

    Args:
        rows: uint8 pointers [N, 1, 1] to where the rows start, at even addresses.
        chunk: integers [1, C, 1].
        byte: integers [1, 1, B], B being the chunk's bytes.
    """
    is_inside = chunk < num_chunks(FORM, WIDTH)
    group = chunk % _chunks_per_block(FORM)
    block = rows + chunk // _chunks_per_block(FORM) * block_bytes(FORM)
    if FORM == "f16":
        found = _elements(block, byte, is_inside & (32 * chunk + byte < WIDTH), tl.float16)
    elif FORM == "bf16":
        found = _elements(block, byte, is_inside & (32 * chunk + byte < WIDTH), tl.bfloat16)
    elif FORM == "q8_0":
        found = _half(block, is_inside) * _signed(_bytes(block + 2 + byte, is_inside))
    elif FORM == "q4_0":
        codes = _bytes(block + 2 + byte, is_inside) >> (4 * PLANE) & 15
        found = _half(block, is_inside) * (codes.to(tl.float32) - 8)
    elif FORM == "q2_0":
        codes = _bytes(block + 2 + byte, is_inside) >> (2 * PLANE) & 3
        found = _half(block, is_inside) * (codes.to(tl.float32) - 1)
    elif FORM == "tq2_0":
        codes = _bytes(block + 32 * group + byte, is_inside) >> (2 * PLANE) & 3
        found = _half(block + 64, is_inside) * (codes.to(tl.float32) - 1)
    elif FORM == "tq1_0":
        digits = _trits(_bytes(block + 4 * group + byte, is_inside), PLANE)
        found = _half(block + 52, is_inside) * (digits.to(tl.float32) - 1)
    elif FORM == "q2_k":
        found = _q2_k(block, group, byte, is_inside, PLANE)
    elif FORM == "q3_k":
        found = _q3_k(block, group, byte, is_inside, PLANE)
    elif FORM == "q6_k":
        found = _q6_k(block, group, byte, is_inside, PLANE)
    else:
        tl.static_assert(FORM == "q4_k" or FORM == "q5_k", "no kernel for a form")
        found = _q4_k_or_q5_k(block, group, byte, is_inside, FORM, PLANE)
    return found


@triton.jit
def _bytes(pointers: tl.tensor, is_inside: tl.tensor) -> tl.tensor:
    """int32 values of uint8, 0 where nothing is."""
    return tl.load(pointers, mask=is_inside, other=0).to(tl.int32)


@triton.jit
def _signed(codes: tl.tensor) -> tl.tensor:
    """float32 of what int32 0..255 is as int8."""
    return codes.to(tl.int8).to(tl.float32)


@triton.jit
def _half(pointers: tl.tensor, is_inside: tl.tensor) -> tl.tensor:
    """float32 of the fp16 that starts at each byte, 0 where nothing is."""
    halves = pointers.to(tl.pointer_type(tl.float16))
    return tl.load(halves, mask=is_inside, other=0.0).to(tl.float32)


@triton.jit
def _elements(
    block: tl.tensor, number: tl.tensor, is_inside: tl.tensor, dtype: tl.constexpr
) -> tl.tensor:
    """float32 of the `number`-th 16-bit float from each block's first byte on."""
    pointers = block.to(tl.pointer_type(dtype)) + number
    return tl.load(pointers, mask=is_inside, other=0.0).to(tl.float32)


@triton.jit
def _trits(codes: tl.tensor, PLANE: tl.constexpr) -> tl.tensor:
    """Digit 0..2 of base-3 bytes: the carry of 3 * (byte * 3^PLANE mod 256)."""
    power: tl.constexpr = 3**PLANE
    return (codes * power & 255) * 3 >> 8


@triton.jit
def _q2_k(
    block: tl.tensor, group: tl.tensor, byte: tl.tensor, is_inside: tl.tensor, PLANE: tl.constexpr
) -> tl.tensor:
    sub_block = 8 * (group // 2) + 2 * PLANE + group % 2
    scales = _bytes(block + sub_block, is_inside)
    scale = _half(block + 80, is_inside) * (scales & 15).to(tl.float32)
    minimum = _half(block + 82, is_inside) * (scales >> 4).to(tl.float32)
    codes = _bytes(block + 16 + 16 * group + byte, is_inside) >> (2 * PLANE) & 3
    return scale * codes.to(tl.float32) - minimum


@triton.jit
def _q3_k(
    block: tl.tensor, group: tl.tensor, byte: tl.tensor, is_inside: tl.tensor, PLANE: tl.constexpr
) -> tl.tensor:
    sub_block = 8 * (group // 2) + 2 * PLANE + group % 2
    low = _bytes(block + 96 + sub_block % 8, is_inside) >> 4 * (sub_block // 8) & 15
    high = _bytes(block + 104 + sub_block % 4, is_inside) >> 2 * (sub_block // 4) & 3
    scale = _half(block + 108, is_inside) * ((low | high << 4).to(tl.float32) - 32)
    codes = _bytes(block + 32 + 16 * group + byte, is_inside) >> (2 * PLANE) & 3
    bits = _bytes(block + 16 * (group % 2) + byte, is_inside) >> (4 * (group // 2) + PLANE) & 1
    return scale * ((codes | bits << 2).to(tl.float32) - 4)


@triton.jit
def _q4_k_or_q5_k(
    block: tl.tensor,
    group: tl.tensor,
    byte: tl.tensor,
    is_inside: tl.tensor,
    FORM: tl.constexpr,
    PLANE: tl.constexpr,
) -> tl.tensor:
    sub_block = 2 * group + PLANE
    place = sub_block % 4
    first = _bytes(block + 4 + place, is_inside)
    second = _bytes(block + 8 + place, is_inside)
    third = _bytes(block + 12 + place, is_inside)
    scales = tl.where(sub_block < 4, first & 63, third & 15 | first >> 6 << 4)
    mins = tl.where(sub_block < 4, second & 63, third >> 4 | second >> 6 << 4)
    scale = _half(block, is_inside) * scales.to(tl.float32)
    minimum = _half(block + 2, is_inside) * mins.to(tl.float32)
    if FORM == "q5_k":
        codes = _bytes(block + 48 + 32 * group + byte, is_inside) >> (4 * PLANE) & 15
        codes |= (_bytes(block + 16 + byte, is_inside) >> sub_block & 1) << 4
    else:
        codes = _bytes(block + 16 + 32 * group + byte, is_inside) >> (4 * PLANE) & 15
    return scale * codes.to(tl.float32) - minimum


@triton.jit
def _q6_k(
    block: tl.tensor, group: tl.tensor, byte: tl.tensor, is_inside: tl.tensor, PLANE: tl.constexpr
) -> tl.tensor:
    half, quarter = group // 4, group % 4
    codes = _bytes(block + 16 * group + byte, is_inside) >> (4 * PLANE) & 15
    high = _bytes(block + 128 + 32 * half + 16 * (group % 2) + byte, is_inside)
    codes |= (high >> 2 * (2 * PLANE + quarter // 2) & 3) << 4
    scales = _signed(_bytes(block + 192 + 8 * half + 4 * PLANE + quarter, is_inside))
    scale = scales * _half(block + 208, is_inside)
    return scale * (codes.to(tl.float32) - 32)
