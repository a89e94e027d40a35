"""Bit layouts that several ggml block formats share. All arrays are uint8."""

from __future__ import annotations

import numpy as np

from edge_moe.formats.base import ByteArray

_TWO_BIT_SHIFTS = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
_ONE_BIT_SHIFTS = np.arange(8, dtype=np.uint8)[:, None]
_NIBBLE_SHIFTS = np.array([0, 4], dtype=np.uint8)[:, None]


def _join(planes: ByteArray, shifts: ByteArray) -> ByteArray:
    """Codes [..., planes, b] -> [..., b] with plane i shifted left by `shifts[i]`."""
    joined: ByteArray = np.bitwise_or.reduce(planes << shifts, axis=-2)
    return joined


def _split(packed: ByteArray, shifts: ByteArray, mask: int) -> ByteArray:
    """[..., 1, b] -> [..., planes, b]."""
    return (packed >> shifts) & np.uint8(mask)


def join_2bit_planes(codes: ByteArray) -> ByteArray:
    """Codes 0..3 [n, 256] -> [n, 64]: byte 32 j + m holds weights 128 j + 32 i + m at bits 2 i."""
    return _join(codes.reshape(-1, 2, 4, 32), _TWO_BIT_SHIFTS).reshape(-1, 64)


def split_2bit_planes(packed: ByteArray) -> ByteArray:
    """Inverse of `join_2bit_planes`: [n, 64] -> codes 0..3 [n, 256]."""
    return _split(packed.reshape(-1, 2, 1, 32), _TWO_BIT_SHIFTS, 3).reshape(-1, 256)


def join_high_bits(bits: ByteArray) -> ByteArray:
    """Bits 0..1 [n, 256] -> [n, 32]: byte m holds weight 32 i + m at bit i."""
    return _join(bits.reshape(-1, 8, 32), _ONE_BIT_SHIFTS)


def split_high_bits(packed: ByteArray) -> ByteArray:
    """Inverse of `join_high_bits`: [n, 32] -> [n, 256]."""
    return _split(packed.reshape(-1, 1, 32), _ONE_BIT_SHIFTS, 1).reshape(-1, 256)


def join_nibble_planes(codes: ByteArray) -> ByteArray:
    """Codes 0..15 [n, 256] -> [n, 128]: byte 32 j + m holds weights 64 j + m and 64 j + 32 + m."""
    return _join(codes.reshape(-1, 4, 2, 32), _NIBBLE_SHIFTS).reshape(-1, 128)


def split_nibble_planes(packed: ByteArray) -> ByteArray:
    """Inverse of `join_nibble_planes`: [n, 128] -> [n, 256]."""
    return _split(packed.reshape(-1, 4, 1, 32), _NIBBLE_SHIFTS, 15).reshape(-1, 256)


def join_nibble_halves(codes: ByteArray) -> ByteArray:
    """Codes 0..15 [n, 256] -> [n, 128]: byte 64 j + m holds weights i and i + 64, i = 128 j + m."""
    return _join(codes.reshape(-1, 2, 2, 64), _NIBBLE_SHIFTS).reshape(-1, 128)


def split_nibble_halves(packed: ByteArray) -> ByteArray:
    """Inverse of `join_nibble_halves`: [n, 128] -> [n, 256]."""
    return _split(packed.reshape(-1, 2, 1, 64), _NIBBLE_SHIFTS, 15).reshape(-1, 256)


def join_q3_k_scales(scales: ByteArray) -> ByteArray:
    """Sixteen 6-bit scales [n, 16] -> [n, 12].

    Byte i < 8 holds the low nibbles of scales i and i + 8; byte 8 + i % 4 holds the two high bits
    of scale i at bits 2 (i // 4).
    """
    high_bits, low_bits = np.divmod(scales, np.uint8(16))
    low = _join(low_bits.reshape(-1, 2, 8), _NIBBLE_SHIFTS)
    high = _join(high_bits.reshape(-1, 4, 4), _TWO_BIT_SHIFTS)
    return np.concatenate([low, high], axis=1)


def split_q3_k_scales(packed: ByteArray) -> ByteArray:
    """Inverse of `join_q3_k_scales`: [n, 12] -> [n, 16]."""
    low = _split(packed[:, None, :8], _NIBBLE_SHIFTS, 15).reshape(-1, 16)
    high = _split(packed[:, None, 8:], _TWO_BIT_SHIFTS, 3).reshape(-1, 16)
    return low | high << np.uint8(4)


def join_q4_k_scales(scales: ByteArray, mins: ByteArray) -> ByteArray:
    """Eight 6-bit scales and mins [n, 8] -> [n, 12].

    Byte i < 4 holds scale i and the high bits of scale i + 4, byte 4 + i the same of the mins,
    byte 8 + i the low nibbles of scale i + 4 and min i + 4.
    """
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = mins[:, :4] | mins[:, 4:] >> 4 << 6
    third = scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=1)


def split_q4_k_scales(packed: ByteArray) -> tuple[ByteArray, ByteArray]:
    """Inverse of `join_q4_k_scales`: [n, 12] -> (scales [n, 8], mins [n, 8])."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    mins = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scales, mins
