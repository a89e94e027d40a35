"""Packed weights to float32 on any torch device, equal bit for bit to `edge_moe.formats`.

Runs for every routed expert of every token, so each form takes a handful of operations on whole
matrices, which treat several bytes at a time as one integer word. The block layouts are described
in `edge_moe.formats`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from edge_moe.errors import FormError
from edge_moe.formats import get_form

Tensor = torch.Tensor

_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F
_LOW_PAIRS = 0x0303030303030303
_LOW_BITS = 0x0101010101010101


def unpack(form_name: str, packed: Tensor, width: int) -> Tensor:
    """uint8 [rows, row_bytes] -> float32 [rows, width], on the device of `packed`.

    Memory: the result, and at most half of it for codes. f32 is a view of `packed` where possible.

    Raises:
        FormError: unknown form, or rows of another length than `width` implies.
    """
    form = get_form(form_name)
    row_bytes = form.row_bytes(width)
    if packed.shape[-1] != row_bytes:
        raise FormError(
            f"a row of {width} weights in form {form_name} takes {row_bytes} bytes, "
            f"found {packed.shape[-1]}"
        )
    if form_name == "int8_row":
        return _unpack_int8_row(packed)
    if form.block_size == 1:
        return words_of(packed, _FLOAT_DTYPES[form_name]).float()
    blocks = packed.reshape(-1, form.block_bytes)
    return _UNPACK_BLOCKS[form_name](blocks).view(*packed.shape[:-1], width)


def words_of(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of `packed` [n, b] as `dtype` [n, b / itemsize], copied where views cannot be."""
    flat = packed.reshape(-1)
    if flat.storage_offset() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(*packed.shape[:-1], -1)


def _half(blocks: Tensor, offset: int) -> Tensor:
    """fp16 at byte `offset` of every block, as float32 [n, 1]."""
    return words_of(blocks[:, offset : offset + 2], torch.float16).float()


def _planes(packed: Tensor, groups: int, bits: int, mask: int) -> Tensor:
    """Codes of `bits` bits, stored in planes: byte m of a group holds weight m + i * b at bits * i.

    Args:
        packed: [n, groups * b] bytes.
        mask: the code's mask in every byte of a word.

    Returns: int64 words [n, groups, 8 / bits, b / 8], whose bytes are the codes in weight order.
    """
    words = words_of(packed, torch.int64).view(len(packed), groups, -1)
    planes = words.new_empty(len(packed), groups, 8 // bits, words.shape[-1])
    for plane in range(8 // bits):
        torch.bitwise_right_shift(words, plane * bits, out=planes[:, :, plane])
    return planes.bitwise_and_(mask)


def _signed_bytes(words: Tensor, shape: tuple[int, ...], offset: int = 0) -> Tensor:
    """Bytes of `words` less `offset`, as float32 of `shape`."""
    codes = words.view(torch.int8).view(shape)
    return (codes.sub_(offset) if offset else codes).float()


def _tritwords(packed: Tensor) -> Tensor:
    """Digits 0..2 of base-3 bytes [n, 52], as int32 words [5, n, 13].

    Digit k of byte b is the carry of 3 * (b * 3^k mod 256), computed in 16-bit lanes: first for the
    odd bytes of a word, then for the even ones.
    """
    powers = packed.new_empty(5, *packed.shape)
    powers[0] = packed
    for digit in range(4):
        torch.mul(powers[digit], 3, out=powers[digit + 1])  # modulo 256
    words = powers.view(torch.int32)
    odd = (words >> 8).bitwise_and_(0x00FF00FF).mul_(3).bitwise_and_(0x03000300)
    even = words.bitwise_and_(0x00FF00FF).mul_(3).bitwise_right_shift_(8)
    return even.bitwise_and_(0x00030003).bitwise_or_(odd)


def _unpack_tq1_0(blocks: Tensor) -> Tensor:
    digits = _tritwords(blocks[:, :52]).transpose(0, 1)  # [n, 5, 13]
    words = digits.new_empty(len(blocks), 64)
    words[:, :40].view(-1, 5, 8).copy_(digits[:, :, :8])
    words[:, 40:60].view(-1, 5, 4).copy_(digits[:, :, 8:12])
    words[:, 60:].copy_(digits[:, :4, 12])
    return _signed_bytes(words, (len(blocks), 256), 1).mul_(_half(blocks, 52))


def _unpack_tq2_0(blocks: Tensor) -> Tensor:
    words = _planes(blocks[:, :64], 2, 2, _LOW_PAIRS)
    return _signed_bytes(words, (len(blocks), 256), 1).mul_(_half(blocks, 64))


@cache
def _quads(device: torch.device) -> Tensor:
    """int32 [256]: four levels code - 1 of every q2_0 byte, as its four bytes."""
    codes = torch.arange(256)[:, None] >> torch.tensor([0, 2, 4, 6]) & 3
    return (codes - 1).to(torch.int8).view(torch.int32).view(-1).to(device)


def _unpack_q2_0(blocks: Tensor) -> Tensor:
    quads = _quads(blocks.device).index_select(0, blocks[:, 2:].int().view(-1))
    return _signed_bytes(quads, (len(blocks), 64)).mul_(_half(blocks, 0))


def _unpack_q4_0(blocks: Tensor) -> Tensor:
    words = _planes(blocks[:, 2:], 1, 4, _LOW_NIBBLES)
    return _signed_bytes(words, (len(blocks), 32), 8).mul_(_half(blocks, 0))


def _unpack_q8_0(blocks: Tensor) -> Tensor:
    return words_of(blocks[:, 2:], torch.int8).float().mul_(_half(blocks, 0))


def _unpack_q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    scale = (scales & 15).float().mul_(_half(blocks, 80)).unsqueeze(-1)  # [n, 16, 1]
    minimum = (scales >> 4).float().mul_(_half(blocks, 82)).unsqueeze(-1)
    words = _planes(blocks[:, 16:80], 2, 2, _LOW_PAIRS)
    return _signed_bytes(words, (len(blocks), 16, 16)).mul_(scale).sub_(minimum)


def _unpack_q3_k(blocks: Tensor) -> Tensor:
    words = _planes(blocks[:, :32], 1, 1, _LOW_BITS).bitwise_left_shift_(2)  # [n, 1, 8, 4]
    words.bitwise_or_(_planes(blocks[:, 32:96], 2, 2, _LOW_PAIRS).view(words.shape))
    scales = blocks[:, 96:108]
    low = torch.cat([scales[:, :8] & 15, scales[:, :8] >> 4], dim=1)
    high = torch.cat([scales[:, 8:] >> shift & 3 for shift in (0, 2, 4, 6)], dim=1)
    scale = (low | high << 4).float().sub_(32).mul_(_half(blocks, 108)).unsqueeze(-1)  # [n, 16, 1]
    return _signed_bytes(words, (len(blocks), 16, 16), 4).mul_(scale)


def _scales_and_mins(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, minimum) of the sub-blocks of q4_k and q5_k, float32 [n, 8, 1] each."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=1)
    mins = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=1)
    scale = scales.float().mul_(_half(blocks, 0))
    minimum = mins.float().mul_(_half(blocks, 2))
    return scale.unsqueeze(-1), minimum.unsqueeze(-1)


def _unpack_q4_k(blocks: Tensor) -> Tensor:
    scale, minimum = _scales_and_mins(blocks)
    words = _planes(blocks[:, 16:], 4, 4, _LOW_NIBBLES)
    return _signed_bytes(words, (len(blocks), 8, 32)).mul_(scale).sub_(minimum)


def _unpack_q5_k(blocks: Tensor) -> Tensor:
    scale, minimum = _scales_and_mins(blocks)
    words = _planes(blocks[:, 16:48], 1, 1, _LOW_BITS).bitwise_left_shift_(4)  # [n, 1, 8, 4]
    words.bitwise_or_(_planes(blocks[:, 48:], 4, 4, _LOW_NIBBLES).view(words.shape))
    return _signed_bytes(words, (len(blocks), 8, 32)).mul_(scale).sub_(minimum)


def _unpack_q6_k(blocks: Tensor) -> Tensor:
    words = _planes(blocks[:, 128:192], 2, 2, _LOW_PAIRS).bitwise_left_shift_(4)  # [n, 2, 4, 4]
    words.bitwise_or_(_planes(blocks[:, :128], 2, 4, _LOW_NIBBLES).view(words.shape))
    scale = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208)).unsqueeze(-1)
    return _signed_bytes(words, (len(blocks), 16, 16), 32).mul_(scale)


def _integers(blocks: Tensor, bits: int) -> Tensor:
    """Blocks of ONNX Runtime's integer forms: codes lowest bits first, then a float32 scale."""
    codes = blocks[:, :-4]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=blocks.device)
    signed = (codes.unsqueeze(-1) >> shifts).bitwise_and_(2**bits - 1).float()
    scales = words_of(blocks[:, -4:], torch.float32)
    return signed.view(len(blocks), -1).sub_(2 ** (bits - 1)).mul_(scales)


def _unpack_int2(blocks: Tensor) -> Tensor:
    return _integers(blocks, 2)


def _unpack_int4(blocks: Tensor) -> Tensor:
    return _integers(blocks, 4)


def _unpack_int8_row(packed: Tensor) -> Tensor:
    rows = packed.reshape(-1, packed.shape[-1])
    scales = words_of(rows[:, -4:], torch.float32)
    weights = rows[:, :-4].float().sub_(128).mul_(scales)
    return weights.view(*packed.shape[:-1], -1)


_FLOAT_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_UNPACK_BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "tq1_0": _unpack_tq1_0,
    "tq2_0": _unpack_tq2_0,
    "q2_0": _unpack_q2_0,
    "q2_k": _unpack_q2_k,
    "int2_b64": _unpack_int2,
    "int2_b32": _unpack_int2,
    "q3_k": _unpack_q3_k,
    "q4_0": _unpack_q4_0,
    "q4_k": _unpack_q4_k,
    "int4_b64": _unpack_int4,
    "int4_b32": _unpack_int4,
    "q5_k": _unpack_q5_k,
    "q6_k": _unpack_q6_k,
    "q8_0": _unpack_q8_0,
}
