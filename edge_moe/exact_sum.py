"""Sums of floats that do not depend on the order of adding.

Each addend is rounded once to a multiple of 2**-60 and kept as two int64 limbs,
value = high * 2**-8 + low * 2**-60 with 0 <= low < 2**52. Integer addition is associative, so
statistics of shards merge into bit for bit what one run gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_HIGH_SCALE = 2.0**8
_LOW_BITS = 52
_LOW_SCALE = 2.0**_LOW_BITS
_LIMIT = 2.0**53


@dataclass(eq=False)
class ExactSum:
    """An array of exact running sums. Range +-2**53, resolution 2**-60."""

    high: npt.NDArray[np.int64]
    low: npt.NDArray[np.int64]

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> ExactSum:
        return cls(np.zeros(shape, np.int64), np.zeros(shape, np.int64))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.high.shape

    def add(self, values: npt.ArrayLike, index: Any = ...) -> None:
        """Add finite `values` to `self[index]`.

        Raises:
            OverflowError: a value is not finite or its magnitude exceeds 2**53.
        """
        floats = np.asarray(values, dtype=np.float64)
        if not (np.abs(floats) < _LIMIT).all():  # also false for NaN
            raise OverflowError("a calibration sum is not finite or exceeds 2**53")
        scaled: npt.NDArray[np.float64] = floats * _HIGH_SCALE
        high = np.floor(scaled)
        low = np.rint((scaled - high) * _LOW_SCALE).astype(np.int64)
        self._add_limbs(high.astype(np.int64), low, index)

    def merge(self, other: ExactSum) -> None:
        """Add every sum of `other`."""
        self._add_limbs(other.high, other.low, ...)

    def values(self, index: Any = ...) -> npt.NDArray[np.float64]:
        """The sums at `index`, rounded to float64."""
        sums: npt.NDArray[np.float64] = self.high[index] / _HIGH_SCALE
        sums += self.low[index] / (_HIGH_SCALE * _LOW_SCALE)
        return sums

    def limbs(self) -> npt.NDArray[np.int64]:
        """[..., 2] int64 (high, low), for storage."""
        return np.stack([self.high, self.low], axis=-1)

    @classmethod
    def from_limbs(cls, limbs: npt.NDArray[np.int64]) -> ExactSum:
        return cls(limbs[..., 0].copy(), limbs[..., 1].copy())

    def _add_limbs(
        self, high: npt.NDArray[np.int64], low: npt.NDArray[np.int64], index: Any
    ) -> None:
        total = self.low[index] + low
        carry = total >> _LOW_BITS
        self.low[index] = total - (carry << _LOW_BITS)
        self.high[index] += high + carry
