"""Locks between processes, on open files; a killed process lets go of them.

Some file systems have none: NFS without its lock service, Lustre mounted without `flock`.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import IO

_NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))


def lock(handle: IO[str], *, waits: bool = False) -> bool:
    """Whether the file is locked now, until it is closed; False where its file system has no locks.

    Raises:
        BlockingIOError: another process holds it, and `waits` is False.
        OSError: another problem, with the file's name.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise OSError(error.errno, os.strerror(error.errno or 0), handle.name) from None
    return True


def lock_if_possible(handle: IO[str], *, waits: bool = False) -> None:
    """The same, but say on stderr where there are no locks, for then nothing keeps others out."""
    if lock(handle, waits=waits):
        return
    from rich.console import Console  # where all goes well a process stays small

    Console(stderr=True, highlight=False, markup=False).print(
        f"{handle.name} cannot be locked, for its file system has no locks: going on without, so "
        "start nothing else that writes there (or mount it with locks, or choose another folder)",
        soft_wrap=True,
    )
