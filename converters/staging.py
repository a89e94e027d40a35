"""`BuildFolder`: a build grows in a hidden folder beside its output and is renamed when complete.

.NAME.building/
    lock            held while a build runs
    progress.json   fingerprint of the build, and what is known of every finished file
    output/         becomes NAME
    FILE            what costs most: the state of a training, layers that were split
    FOLDER/         other things that a later call need not make again: predictions, samples
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_moe.converters.growing_file import unfinished_bytes
from edge_moe.errors import DiskSpaceError, EdgeMoeError, InputError
from edge_moe.file_lock import lock_if_possible
from edge_moe.files import require_new_output, write_text

_LOCK, _PROGRESS = "lock", "progress.json"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_USABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


class BuildFolder:
    """The files of an unfinished build. `path` is the folder to write into, `scratch` the one for
    what a later call need not make again; it is removed when the build is complete."""

    def __init__(self, output: Path, folder: Path, fingerprint: str) -> None:
        """Continue the unfinished build of `output` in the hidden `folder`, or start one.

        Raises:
            InputError: the folder holds the unfinished build of something else.
        """
        self.output = output
        self.path = folder / "output"
        self.scratch = folder
        self._progress = folder / _PROGRESS
        self._fingerprint = fingerprint
        self._files: dict[str, dict[str, Any]] = self._load(folder)
        self.path.mkdir(exist_ok=True)
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink()

    def finished(self, name: str) -> Any | None:
        """What `add` recorded of file `name`; None when it still has to be written."""
        entry = self._files.get(name)
        path = self.path / name
        if entry is None or not path.exists() or path.stat().st_size != entry["num_bytes"]:
            return None
        return entry["facts"]

    def add(self, name: str, facts: Any = True) -> None:
        """Record that file `name` is complete, with JSON `facts` that a resumed build needs."""
        num_bytes = (self.path / name).stat().st_size
        self._files[name] = {"num_bytes": num_bytes, "facts": facts}
        self._save()

    def written_bytes(self) -> int:
        """Bytes that finished files take already."""
        names = [name for name in self._files if self.finished(name) is not None]
        return sum(int(self._files[name]["num_bytes"]) for name in names)

    def is_begun(self) -> bool:
        """Whether files for the output are there, finished or not."""
        return bool(self.written_bytes() or unfinished_bytes(self.path))

    def has_state(self) -> bool:
        """Whether a training left its state beside them, or a split its layers."""
        names = [path.name for path in self.scratch.iterdir() if path.is_file()]
        return any(name not in (_LOCK, _PROGRESS) and not name.endswith(".tmp") for name in names)

    def has_scratch(self) -> bool:
        """Whether anything was kept beside them."""
        folders = [path for path in self.scratch.iterdir() if path.is_dir() and path != self.path]
        found = [path for folder in folders for path in folder.rglob("*")]
        return self.has_state() or any(path.is_file() and path.suffix != ".tmp" for path in found)

    def _save(self) -> None:
        state = {"fingerprint": self._fingerprint, "files": self._files}
        write_text(self._progress, json.dumps(state) + "\n")

    def _load(self, folder: Path) -> dict[str, dict[str, Any]]:
        try:
            state = json.loads(self._progress.read_text(encoding="utf-8"))
            found, files = state["fingerprint"], dict(state["files"])
        except FileNotFoundError:
            self._files = {}
            self._save()
            return {}
        except (OSError, ValueError, KeyError, TypeError):
            found, files = None, {}
        if found != self._fingerprint:
            raise InputError(
                f"{folder} holds an unfinished build of another plan, target or model: "
                "finish that one, or remove the folder, or choose another output"
            )
        return files


@contextmanager
def build_folder(output: Path, fingerprint: str) -> Iterator[BuildFolder]:
    """Yield the folder to build in; when the block ends well it becomes `output`.

    An interrupted or killed build, or one that met a full disk, stays in the hidden folder and is
    resumed by the next call. A build that failed for its input is removed, unless there is a state
    (a file beside the output): nobody wants to train again because the last file could not be
    written.

    Raises:
        InputError: `output` exists, cannot be written, or is being built already.
        DiskSpaceError: the disk became full.
    """
    output = output.absolute()
    require_new_output(output)
    if output.is_mount():
        raise InputError(f"output {output} is a mount point: choose a folder inside it")
    folder = output.with_name(f".{output.name}.building")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(
            folder / _LOCK,
            f"output {output} is being built by another process: wait for it to finish",
        ):
            work = BuildFolder(output, folder, fingerprint)
            yield from _failing_cleanly(work, folder)
            os.rename(work.path, output)
            shutil.rmtree(folder)
    except OSError as error:
        if not (folder / _PROGRESS).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise _explained(error, output) from error


def _failing_cleanly(work: BuildFolder, folder: Path) -> Iterator[BuildFolder]:
    try:
        yield work
    except Exception as error:
        may_go_on = isinstance(error, DiskSpaceError) or not isinstance(error, EdgeMoeError)
        has_more = may_go_on and (work.has_scratch() or work.is_begun())
        if not work.has_state() and not has_more:
            shutil.rmtree(folder)
        raise


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock file `path`, where its file system has locks; else say that it has none.

    Raises:
        InputError: `refusal`, where another process holds it.
    """
    with path.open("w") as handle:
        try:
            lock_if_possible(handle)
        except BlockingIOError:
            raise InputError(refusal) from None
        yield


def _explained(error: OSError, output: Path) -> Exception:
    if error.errno in _DISK_FULL:
        return DiskSpaceError(
            f"the disk that holds {output.parent} is full: free some space and run the same "
            "command again, it continues where it stopped"
        )
    if error.errno in _NOT_USABLE:
        return InputError(
            f"cannot build {output}: {error.filename or output}: {error.strerror}; "
            "choose another folder or change its permissions"
        )
    return error
