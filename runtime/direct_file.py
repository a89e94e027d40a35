"""Files that are read past the page cache, where their file system allows that."""

from __future__ import annotations

import os
from pathlib import Path


def open_direct(path: Path) -> tuple[int, bool]:
    """(descriptor for reading, whether O_DIRECT was granted): tmpfs and others may refuse it."""
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            return os.open(path, os.O_RDONLY | direct), True
        except OSError:
            pass
    return os.open(path, os.O_RDONLY), False
