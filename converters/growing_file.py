"""A file that is written part by part; a killed run goes on behind the last part on the disk.

.NAME.partial    the header, and the parts so far
.NAME.progress   JSON: the header's SHA-256, how many parts are on the disk, and where they end
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_moe.errors import DiskSpaceError, EdgeMoeError
from edge_moe.files import os_problem, require_free_disk, write_text

_FLUSH_BYTES = 256 * 2**20
"""So much is written again at most after a run was killed."""


class GrowingFile:
    """The unfinished file. Parts have fixed places, and are written in order."""

    def __init__(self, fd: int, progress: Path, header: bytes, num_done: int, end: int) -> None:
        """`num_done` parts, up to byte `end`, are there."""
        self.fd = fd
        self.num_done = num_done
        self.done_bytes = end
        self._progress = progress
        self._identity = _identity(header)

    def finished(self, num_done: int, end: int) -> None:
        """The first `num_done` parts are written, up to byte `end`; note it now and then."""
        if end - self.done_bytes < _FLUSH_BYTES:
            return
        os.fdatasync(self.fd)
        self.num_done, self.done_bytes = num_done, end
        state = {"header": self._identity, "parts": num_done, "end": end}
        write_text(self._progress, json.dumps(state) + "\n")


@contextmanager
def growing_file(
    output: Path, header: bytes, total_bytes: int, beside_bytes: int = 0
) -> Iterator[GrowingFile]:
    """Yield the file that becomes `output` when the block ends well; it starts with `header`.

    `beside_bytes` are needed on the same disk meanwhile.

    What was killed, interrupted or met a full disk is continued by the next call with an equal
    header; after an error in the input nothing is left.

    Raises:
        DiskSpaceError: too little free space, before anything is written.
        OSError: names `output`, never the unfinished file.
    """
    partial, progress = _names(output)
    num_done, end = _done(partial, progress, header)
    needed_bytes = total_bytes - end + beside_bytes
    require_free_disk(output.parent, needed_bytes, f"GGUF file {output.name}")
    try:
        with partial.open("r+b" if num_done else "wb") as handle:
            fd = handle.fileno()
            if not num_done:
                handle.write(header)
                handle.flush()
            yield GrowingFile(fd, progress, header, num_done, end)
            os.ftruncate(fd, total_bytes)
            os.fsync(fd)
        os.replace(partial, output)
        progress.unlink(missing_ok=True)
    except DiskSpaceError:
        raise
    except EdgeMoeError:
        partial.unlink(missing_ok=True)
        progress.unlink(missing_ok=True)
        raise
    except OSError as error:
        if error.filename not in (None, str(partial)):
            raise
        raise OSError(error.errno, error.strerror or os_problem(error), str(output)) from error


def unfinished_bytes(folder: Path) -> int:
    """What files that did not finish growing hold in `folder`, as far as they can be continued."""
    partials = (path.with_suffix(".partial") for path in folder.glob(".*.progress"))
    return sum(path.stat().st_size for path in partials if path.exists())


def _names(output: Path) -> tuple[Path, Path]:
    stem = f".{output.name}"
    return output.with_name(f"{stem}.partial"), output.with_name(f"{stem}.progress")


def _done(partial: Path, progress: Path, header: bytes) -> tuple[int, int]:
    """(parts, where they end) of an earlier run that wrote the same file; (0, 0) without one."""
    try:
        state = json.loads(progress.read_text(encoding="utf-8"))
        found, num_done, end = state["header"], int(state["parts"]), int(state["end"])
        with partial.open("rb") as handle:
            is_same = found == _identity(header) and handle.read(len(header)) == header
            is_there = os.fstat(handle.fileno()).st_size >= end
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0
    return (num_done, end) if is_same and is_there else (0, 0)


def _identity(header: bytes) -> str:
    return hashlib.sha256(header).hexdigest()
