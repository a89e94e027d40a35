"""Writing files so that a reader never sees half of one, and refusing before the disk is full.

Errors of the operating system always name the path that the user knows, the reason and the remedy.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_moe.errors import DiskSpaceError, EdgeMoeError, InputError
from edge_moe.units import format_bytes

_REMEDIES = {
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EISDIR: "name a file, not a folder",
    errno.EROFS: "choose another place",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOSPC: "free some space and start again",
    errno.EDQUOT: "free some space and start again",
}
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors, written in Rust, spells an error of the operating system."""


def os_problem(error: OSError) -> str:
    """`Permission denied; change its permissions`: the reason and the remedy."""
    remedy = _REMEDIES.get(error.errno or 0, "check the path and its permissions")
    return f"{error.strerror or error}; {remedy}"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it onto `path` when the block succeeds.

    The temporary file is flushed to disk before the rename and removed when the block fails.

    Raises:
        OSError: names `path`, never the temporary file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except EdgeMoeError:
        raise
    except Exception as error:
        number = _os_error_number(error)
        if number is None or getattr(error, "filename", None) not in (None, str(temporary)):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _os_error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = _RUST_ERROR.search(str(error))
    return int(found.group(1)) if found else None


def require_free_disk(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raise `DiskSpaceError` unless `folder` (or its nearest existing parent) has the space.

    Raises:
        DiskSpaceError: names the folder, the bytes needed and the bytes free.
        InputError: no file can be stored there.
    """
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    usage = shutil.disk_usage(existing)
    if usage.total == 0:  # /proc, /sys and the like
        raise InputError(
            f"{folder} cannot be written: {existing} stores no files; choose another folder"
        )
    free_bytes = usage.free
    if free_bytes < needed_bytes:
        raise DiskSpaceError(
            f"{purpose} needs {format_bytes(needed_bytes)} in {folder}, but only "
            f"{format_bytes(free_bytes)} is free there: free some space or choose another folder"
        )


def require_file_output(path: Path, suffix: str, *, makes_folder: bool = False) -> None:
    """Refuse a place where no file can be written, before the work is done.

    `makes_folder`: whoever writes it makes the folder that it is in.

    Raises:
        InputError: `path` is a folder, or in none.
    """
    if path.is_dir():
        raise InputError(f"output {path} is a folder: name a file, such as {path / f'out{suffix}'}")
    if not (makes_folder or path.parent.is_dir()):
        raise InputError(
            f"output {path}: there is no folder {path.parent}; make it first, or choose another"
        )


def require_suffix(path: Path, suffix: str) -> None:
    """Raise InputError unless the name of an output ends in `suffix`."""
    if path.suffix != suffix:
        raise InputError(
            f"output {path} is written as {suffix}: name it so, such as {path.with_suffix(suffix)}"
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
