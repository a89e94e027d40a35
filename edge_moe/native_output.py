"""Keeps what compiled libraries print away from stdout, which belongs to `--json`."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_STDOUT, _STDERR = 1, 2


@contextmanager
def native_stdout_to_stderr() -> Iterator[None]:
    """File descriptor 1 leads to stderr meanwhile.

    HiGHS prints a line with printf now and then, even when it is told to be silent.
    """
    sys.stdout.flush()
    saved = os.dup(_STDOUT)
    try:
        os.dup2(_STDERR, _STDOUT)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(saved, _STDOUT)
        os.close(saved)
