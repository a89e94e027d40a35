"""Arithmetic of scales: what fp16 makes of them, and dividing by one that may be zero."""

from __future__ import annotations

import numpy as np

from edge_moe.formats.base import FloatArray


def as_half(scale: FloatArray) -> FloatArray:
    """Scales rounded to what fp16 can hold; out of range becomes infinity."""
    with np.errstate(over="ignore"):
        return scale.astype(np.float16).astype(np.float32)


def reciprocal(values: FloatArray) -> FloatArray:
    """1 / values, and 0 where that is not a finite number."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / values
    return np.where(np.isfinite(inverse), inverse, np.float32(0))
