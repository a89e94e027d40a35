"""Copying ranges of bytes from file to file inside the kernel, without filling the page cache."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from edge_moe.converters.progress import Advance
from edge_moe.errors import CheckpointError

_PIECE_BYTES = 64 * 2**20
_BUFFER_BYTES = 8 * 2**20
_FLUSH_BYTES = 256 * 2**20
"""After so many bytes written they are sent to the disk, so that their pages can be dropped."""

_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EBADF)
"""Errors that no other way of copying mends."""

_Copy = Callable[[int, int, int, int, int], int]
"""(source, its offset, target, its offset, most bytes) -> bytes copied, 0 at the source's end."""


class RangeCopier:
    """Copies ranges into one open file, by the fastest way that this file system allows.

    Memory: 8 MiB at most, and none where the kernel copies. Pages of what was read and written are
    dropped from the page cache behind it.
    """

    def __init__(self, target: int, advance: Advance) -> None:
        self._target = target
        self._advance = advance
        self._ways: list[_Copy] = [_send, _by_buffer]
        if hasattr(os, "copy_file_range"):
            self._ways.insert(0, _in_kernel)
        self._flushed = 0

    def copy(self, source: int, offset: int, num_bytes: int, target_offset: int, name: str) -> None:
        """Copy a range of the open file `source` to `target_offset`; `name` is for errors.

        Raises:
            CheckpointError: the source ends early.
            OSError: the target cannot be written.
        """
        done = 0
        while done < num_bytes:
            piece = min(_PIECE_BYTES, num_bytes - done)
            copied = self._piece(source, offset + done, target_offset + done, piece)
            if copied == 0:
                raise CheckpointError(
                    f"{name} ended early: it was truncated while being read; download it again"
                )
            os.posix_fadvise(source, offset + done, copied, os.POSIX_FADV_DONTNEED)
            done += copied
            self.wrote(target_offset + done)
            self._advance(copied)

    def wrote(self, end: int) -> None:
        """Everything in front of byte `end` of the target is written; flush it now and then."""
        if end - self._flushed < _FLUSH_BYTES:
            return
        os.fdatasync(self._target)
        os.posix_fadvise(self._target, self._flushed, end - self._flushed, os.POSIX_FADV_DONTNEED)
        self._flushed = end

    def _piece(self, source: int, offset: int, target_offset: int, num_bytes: int) -> int:
        while len(self._ways) > 1:
            try:
                copied = self._ways[0](source, offset, self._target, target_offset, num_bytes)
            except OSError as error:
                if error.errno in _FATAL:
                    raise
                copied = 0
            if copied:
                return copied
            del self._ways[0]  # this file system or kernel does not do it, or the source ended
        return self._ways[0](source, offset, self._target, target_offset, num_bytes)


def _in_kernel(source: int, offset: int, target: int, to: int, num_bytes: int) -> int:
    return os.copy_file_range(source, target, num_bytes, offset, to)


def _send(source: int, offset: int, target: int, to: int, num_bytes: int) -> int:
    os.lseek(target, to, os.SEEK_SET)
    return os.sendfile(target, source, offset, num_bytes)


def _by_buffer(source: int, offset: int, target: int, to: int, num_bytes: int) -> int:
    block = os.pread(source, min(num_bytes, _BUFFER_BYTES), offset)
    write_all(target, block, to)
    return len(block)


def write_all(target: int, block: bytes | memoryview, offset: int) -> None:
    """Write every byte of `block` at `offset`."""
    view = memoryview(block)
    while view:
        written = os.pwrite(target, view, offset)
        view, offset = view[written:], offset + written
