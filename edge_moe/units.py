"""Byte counts, context lengths and shares as people write them.

GB is 10**9 and GiB is 2**30; both are accepted and every printed number carries its unit.
"""

from __future__ import annotations

import re
from decimal import Decimal

from edge_moe.errors import InputError

MAX_SEED = 2**32 - 1
"""Every generator takes it, and seeds of its own that are made of it."""
_BYTE_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str) -> int:
    """`"12GB"` -> 12_000_000_000, `"1.5 GiB"` -> 1_610_612_736.

    Raises:
        InputError: no number, an unknown unit, or no unit at all.
    """
    match = _QUANTITY.fullmatch(text)
    unit = match.group(2).lower() if match else ""
    if match is None or unit not in _BYTE_UNITS:
        raise InputError(
            f"memory size {text!r} is not understood: "
            "write a number and a unit, such as 12GB, 500MB or 8GiB"
        )
    count = int(Decimal(match.group(1)) * _BYTE_UNITS[unit])
    if count <= 0:
        raise InputError(f"memory size {text!r} is not positive: write for example 12GB")
    return count


def format_bytes(count: int | float) -> str:
    """Decimal units with three significant digits: 12_345_678 -> `"12.3 MB"`."""
    sign = "-" if count < 0 else ""
    value = abs(float(count))
    if value < 1000:
        return f"{sign}{value:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{sign}{value:.{digits}f} {unit}"
    raise AssertionError("unreachable")


def round_up_bytes(count: int) -> str:
    """A size to type after --budget, never below `count`: 443_435_538 -> `"443.5MB"`."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            step = 10 ** max(0, len(str(count)) - 4)
            return f"{Decimal(-(-count // step) * step) / scale:f}{unit}"
    return f"{count}B"


def parse_tokens(text: str) -> int:
    """A context length: `"8k"` -> 8192, `"512"` -> 512 (k is 1024, as everywhere in the field).

    Raises:
        InputError: not a positive whole number, with an optional k or m.
    """
    match = re.fullmatch(r"\s*([0-9]+)\s*([kKmM]?)\s*", text)
    scale = {"": 1, "k": 1024, "m": 1024 * 1024}
    count = int(match.group(1)) * scale[match.group(2).lower()] if match else 0
    if count <= 0:
        raise InputError(f"context length {text!r} is not understood: write for example 8k or 4096")
    return count


def parse_share(text: str) -> float:
    """`50%` or `0.5` -> 0.5.

    Raises:
        InputError: not a share above 0 and at most 1.
    """
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(f"share {text!r} is none: use 50% or 0.5, above 0 and at most 1")
    return share
