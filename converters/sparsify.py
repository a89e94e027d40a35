"""The entries of the largest magnitude of a tensor that is read in pieces, and their signs.

Magnitudes are found by two histograms of their bits, which order as the floats do: memory is one
piece, however large the tensor is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edge_moe.delta_layout import SEGMENT_DTYPE, segment_row
from edge_moe.sparse_signs import pack_signs
from edge_moe.tensor_info import FloatArray

Pieces = Callable[[], Iterator[FloatArray]]
"""Gives the tensor's entries from the start, flat, in pieces of a segment; may be called again."""
_HALF_BITS = 16
_MAGNITUDE = 0x7FFFFFFF


@dataclass(frozen=True)
class SparseTensor:
    """What is known of a tensor that was packed."""

    num_weights: int
    num_kept: int
    magnitude: float
    """Sum of |tau|."""
    kept_magnitude: float
    """Sum of |tau| where it is kept."""
    deviation: float
    """Standard deviation of tau."""
    square: float
    """Sum of tau squared."""
    segments: npt.NDArray[np.void]
    """`SEGMENT_DTYPE` [segments]"""


@dataclass
class _Sums:
    """Over all entries, and over those that are kept."""

    count: int = 0
    total: float = 0.0
    magnitude: float = 0.0
    square: float = 0.0
    num_kept: int = 0
    kept_magnitude: float = 0.0
    segments: list[tuple[int, int, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class _Threshold:
    """Entries above are kept, and the first `num_equal` of those that equal it."""

    bits: int
    num_equal: int


def sparsify(pieces: Pieces, density: float, write: Callable[[bytes], object]) -> SparseTensor:
    """Keep the `density` of a tensor's entries of the largest magnitude; write its segments.

    At least one entry is kept, but never a zero; of equal magnitudes the first.
    """
    sums = _Sums()
    threshold = _find_threshold(pieces, density, sums)
    left = threshold.num_equal
    for piece in pieces():
        is_kept, left = _kept(piece, threshold.bits, left)
        places = np.flatnonzero(is_kept)
        values = piece[places]
        sums.num_kept += len(places)
        sums.kept_magnitude += float(np.abs(values).sum(dtype=np.float64))
        packed = pack_signs(places, values < 0, len(piece))
        sums.segments.append(segment_row(packed))
        write(packed.data)
    mean = sums.total / sums.count
    return SparseTensor(
        num_weights=sums.count,
        num_kept=sums.num_kept,
        magnitude=sums.magnitude,
        kept_magnitude=sums.kept_magnitude,
        deviation=math.sqrt(max(sums.square / sums.count - mean**2, 0.0)),
        square=sums.square,
        segments=np.array(sums.segments, SEGMENT_DTYPE),
    )


def _find_threshold(pieces: Pieces, density: float, sums: _Sums) -> _Threshold:
    """Counts all entries, too."""
    upper = np.zeros(2**_HALF_BITS, np.int64)
    num_zeros = 0
    for piece in pieces():
        sums.count += len(piece)
        sums.total += float(piece.sum(dtype=np.float64))
        sums.magnitude += float(np.abs(piece).sum(dtype=np.float64))
        sums.square += float(np.square(piece, dtype=np.float64).sum())
        bits = _magnitude_bits(piece)
        num_zeros += len(piece) - int(np.count_nonzero(bits))
        upper += np.bincount(bits >> _HALF_BITS, minlength=len(upper))
    wanted = min(max(1, round(density * sums.count)), sums.count - num_zeros)
    if not wanted:
        return _Threshold(_MAGNITUDE, 0)
    bucket, wanted = _bucket(upper, wanted)
    lower = np.zeros(2**_HALF_BITS, np.int64)
    for piece in pieces():
        bits = _magnitude_bits(piece)
        inside = bits[bits >> _HALF_BITS == bucket] & (2**_HALF_BITS - 1)
        lower += np.bincount(inside, minlength=len(lower))
    rest, num_equal = _bucket(lower, wanted)
    return _Threshold(bucket << _HALF_BITS | rest, num_equal)


def _bucket(counts: npt.NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """(where the `wanted`th from above lies, how many of those there are wanted)."""
    from_above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_above, wanted))
    above = int(from_above[place - 1]) if place else 0
    return len(counts) - 1 - place, wanted - above


def _kept(piece: FloatArray, threshold: int, left: int) -> tuple[npt.NDArray[np.bool_], int]:
    """(which entries are kept, how many that equal the threshold may still be)."""
    bits = _magnitude_bits(piece)
    is_kept = bits > threshold
    if left:
        equal = np.flatnonzero(bits == threshold)[:left]
        is_kept[equal] = True
        left -= len(equal)
    return is_kept, left


def _magnitude_bits(piece: FloatArray) -> npt.NDArray[np.int32]:
    """Of float32, without the sign."""
    return piece.view(np.int32) & np.int32(_MAGNITUDE)
