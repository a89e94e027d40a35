"""Sparse vectors of -1, 0 and 1, packed near their entropy: Rice-coded gaps and one bit per sign.

What is listed are the places of the entries that are not 0, or of those that are where they are
fewer. A gap g between listed places is g >> b in unary and b low bits (Golomb 1966, Rice 1979;
ComPEFT, arXiv:2311.13171, section 2.2, counts its bytes so); b is the one that takes the fewest
bits. With b = 0 the unary bits are a bitmap. Three streams lie one after the other, each from the
lowest bit of a byte up, so that numpy reads them without a loop:

    low bits   b per listed place
    unary      per listed place g >> b zeros and a one
    signs      one per entry that is not 0, set where it is -1
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_moe.errors import FormError

MOST_LENGTH = 2**20
"""Entries that are packed at once."""
MOST_RICE_BITS = 20
PACKING_BYTES = 64
"""Memory per entry of a vector that is being packed, at most."""

Places = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PackedSigns:
    """One packed vector. Its length is known to the caller."""

    num_kept: int
    """Entries that are not 0."""
    rice_bits: int
    """b"""
    lists_zeros: bool
    data: bytes


def pack_signs(places: Places, is_negative: Flags, length: int) -> PackedSigns:
    """Pack the vector that is -1 or 1 at ascending `places` [k] below `length`, and 0 elsewhere."""
    lists_zeros = 2 * len(places) > length
    listed = _others(places, length) if lists_zeros else places
    gaps = np.diff(listed, prepend=-1) - 1
    rice_bits = _best_rice_bits(gaps)
    streams = (_low_bits(gaps, rice_bits), _unary(gaps >> rice_bits), is_negative)
    data = b"".join(np.packbits(bits, bitorder="little").tobytes() for bits in streams)
    return PackedSigns(len(places), rice_bits, lists_zeros, data)


def unpack_signs(packed: PackedSigns, length: int) -> tuple[Places, Flags]:
    """(places, whether each is -1) of a vector of `length` entries.

    Raises:
        FormError: the bytes are no such vector.
    """
    num_listed = length - packed.num_kept if packed.lists_zeros else packed.num_kept
    if not 0 <= packed.num_kept <= length or not 0 <= packed.rice_bits <= MOST_RICE_BITS:
        raise FormError(f"{packed.num_kept} of {length} signs, {packed.rice_bits} low bits")
    low_bytes = -(-num_listed * packed.rice_bits // 8)
    sign_bytes = -(-packed.num_kept // 8)
    data = np.frombuffer(packed.data, np.uint8)
    unary_bytes = len(data) - low_bytes - sign_bytes
    if unary_bytes < -(-num_listed // 8):
        raise FormError(f"{len(data)} bytes do not hold {packed.num_kept} of {length} signs")
    unary = np.unpackbits(data[low_bytes : low_bytes + unary_bytes], bitorder="little")
    ends = np.flatnonzero(unary)
    if len(ends) != num_listed:
        raise FormError(f"{len(ends)} gaps instead of {num_listed}")
    gaps = (np.diff(ends, prepend=-1) - 1) << packed.rice_bits
    gaps |= _lows(data[:low_bytes], num_listed, packed.rice_bits)
    listed = np.cumsum(gaps + 1) - 1
    if num_listed and listed[-1] >= length:
        raise FormError(f"a sign at place {listed[-1]} of {length}")
    signs = np.unpackbits(
        data[len(data) - sign_bytes :], count=packed.num_kept, bitorder="little"
    ).view(np.bool_)
    return (_others(listed, length) if packed.lists_zeros else listed), signs


def unpacking_bytes(num_kept: int, length: int) -> int:
    """Memory while a vector is unpacked and added to others, at most."""
    return 3 * length + 72 * num_kept


def entropy_bytes(num_kept: int, length: int) -> float:
    """Bytes below which no code of random places and signs goes on average: n H(k / n) + k bits."""
    share = num_kept / length
    if share in (0.0, 1.0):
        return num_kept / 8
    bits = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    return (length * bits + num_kept) / 8


def most_bytes(num_kept: int, length: int) -> int:
    """Bytes that `pack_signs` takes at most, wherever the places are."""
    listed = min(num_kept, length - num_kept)
    gaps_bits = min(
        listed * (bits + 1) + ((length - listed) >> bits) for bits in range(MOST_RICE_BITS + 1)
    )
    return (gaps_bits + num_kept) // 8 + 3


def _others(places: Places, length: int) -> Places:
    """The places below `length` that are not among `places`."""
    is_left = np.ones(length, np.bool_)
    is_left[places] = False
    return np.flatnonzero(is_left)


def _best_rice_bits(gaps: Places) -> int:
    """The b with the fewest bits: near log2 of the mean gap, whose neighbours are tried, too."""
    if not len(gaps):
        return 0
    near = int(math.log2(gaps.mean() + 1))
    tried = range(max(0, near - 2), min(MOST_RICE_BITS, near + 1) + 1)
    return min(tried, key=lambda bits: len(gaps) * bits + int((gaps >> bits).sum()))


def _low_bits(gaps: Places, rice_bits: int) -> Flags:
    """[k, b] the low bits of every gap, lowest first."""
    bits = np.empty((len(gaps), rice_bits), np.bool_)
    for place in range(rice_bits):
        bits[:, place] = gaps >> place & 1
    return bits.reshape(-1)


def _lows(data: npt.NDArray[np.uint8], count: int, rice_bits: int) -> Places:
    """The inverse of `_low_bits`, as numbers."""
    bits = np.unpackbits(data, count=count * rice_bits, bitorder="little").reshape(count, rice_bits)
    lows = np.zeros(count, np.int64)
    for place in range(rice_bits):
        lows |= bits[:, place].astype(np.int64) << place
    return lows


def _unary(quotients: Places) -> Flags:
    """That many zeros and a one, for each."""
    ends = np.cumsum(quotients + 1) - 1
    bits = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.bool_)
    bits[ends] = True
    return bits
