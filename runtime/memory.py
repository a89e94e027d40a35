"""How much memory this process really took, seen from outside its allocators."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

_M_ARENA_MAX = -8  # glibc's mallopt: arenas per process
_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 2**20


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
    """Keep glibc from holding freed memory: few arenas, large pieces handed back; no-op elsewhere.

    glibc otherwise raises its threshold for handing back to 32 MB, and a prompt of 4096 tokens then
    leaves 50 MB behind.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_ARENA_MAX, count)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
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
