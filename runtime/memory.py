"""How much memory this process really took, seen from outside its allocators."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

_M_ARENA_MAX = -8  # glibc's mallopt: arenas per process


def peak_memory_bytes(device_type: str = "cpu") -> int:
    """Peak resident set of this process (VmHWM), or on CUDA what torch reserved at most.

    Raises:
        OSError: the platform has no /proc.
    """
    if device_type == "cuda":
        import torch

        return int(torch.cuda.max_memory_reserved())
    return _status_bytes("VmHWM")


def resident_memory_bytes() -> int:
    """Resident set of this process now (VmRSS)."""
    return _status_bytes("VmRSS")


def limit_arenas(count: int = 2) -> None:
    """Keep glibc from opening an arena per thread, which holds freed memory; no-op elsewhere."""
    try:
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, count)
    except (OSError, AttributeError):
        return


def trim() -> None:
    """Hand freed memory back to the system; no-op where libc cannot."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(match.group(1)) * 1024
