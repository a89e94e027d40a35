"""Writing files so that a reader never sees half of one, and refusing before the disk is full."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_moe.errors import DiskSpaceError, InputError
from edge_moe.units import format_bytes


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it onto `path` when the block succeeds.

    The temporary file is flushed to disk before the rename and removed when the block fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def require_free_disk(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raise `DiskSpaceError` unless `folder` (or its nearest existing parent) has the space.

    Raises:
        DiskSpaceError: names the folder, the bytes needed and the bytes free.
    """
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise DiskSpaceError(
            f"{purpose} needs {format_bytes(needed_bytes)} in {folder}, but only "
            f"{format_bytes(free_bytes)} is free there: free some space or choose another folder"
        )


def require_new_output(path: Path) -> None:
    """Refuse to write where something else already is.

    Raises:
        InputError: `path` exists and is not an empty folder.
    """
    if not path.exists():
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    raise InputError(f"output {path} already exists: choose another path or remove it first")
