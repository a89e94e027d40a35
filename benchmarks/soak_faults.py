"""Disk errors while experts are paged in, for `soak_worker.py`: injected, or done to a copy.

Engines read experts by `os.preadv`, or have the system do it (`DirectReads`); every fifth read of a
process fails, whoever asks for it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_moe.runtime.direct_reads import DirectReads

EVERY = 5
EXPECTED: dict[str, tuple[str, ...]] = {
    "EIO": ("Input/output error",),
    "end of file": ("ended early",),
    "short read": (),
    "replaced": (),
    "truncated": ("ended early", "has changed"),
    "written to": ("has changed",),
}
"""What the error says, one of these beside the file's name; empty where there must be none: what is
missing is read again, and a replaced file stays open."""
INJECTED = ("EIO", "end of file", "short read")
PAGE_BYTES = 4096


@contextmanager
def failing_reads(kind: str) -> Iterator[None]:
    """Let every fifth read of this process fail.

    The system's own that end early are gone on with by `os.preadv`, which then finds the same end.
    """
    real_preadv, real_over = os.preadv, DirectReads.over
    calls = 0
    is_at_end = False

    def fails() -> bool:
        nonlocal calls
        calls += 1
        return calls % EVERY == 0

    def preadv(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        nonlocal is_at_end
        if not (is_at_end or fails()):
            return real_preadv(descriptor, buffers, offset)
        is_at_end = False
        if kind == "EIO":
            raise OSError(errno.EIO, "bad sector")
        if kind == "end of file":
            return 0
        return real_preadv(descriptor, [memoryview(buffers[0])[:PAGE_BYTES]], offset)

    def over(self: DirectReads, at_least: int = 0) -> list[tuple[int, int]]:
        nonlocal is_at_end
        found = []
        for index, result in real_over(self, at_least):
            if not fails():
                found.append((index, result))
                continue
            is_at_end |= kind == "end of file"
            found.append((index, {"EIO": -errno.EIO, "end of file": 0}.get(kind, PAGE_BYTES)))
        return found

    os.preadv, DirectReads.over = preadv, over  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        os.preadv, DirectReads.over = real_preadv, real_over  # type: ignore[method-assign]


def damage(kind: str, copy: Path) -> None:
    """Do something to the experts' file of a copy that is open."""
    path = experts_file(copy)
    if kind == "replaced":
        other = path.with_name("other")
        other.write_bytes(b"nothing")
        os.replace(other, path)
    elif kind == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        with path.open("r+b") as handle:
            handle.seek(path.stat().st_size // 2)
            handle.write(b"\xff" * PAGE_BYTES)


def experts_file(model: Path) -> Path:
    """A GGUF file itself, or the largest of a package's files of experts."""
    if model.is_file():
        return model
    return max(model.glob("experts-*.safetensors"), key=lambda path: path.stat().st_size)


@contextmanager
def copied(model: Path, folder: Path) -> Iterator[Path]:
    """A copy of the model in `folder`, removed afterwards."""
    copy = folder / f"copy-{model.name}"
    if model.is_file():
        shutil.copyfile(model, copy)
    else:
        shutil.copytree(model, copy)
    try:
        yield copy
    finally:
        copy.unlink() if copy.is_file() else shutil.rmtree(copy)


def provoked(answer: Callable[[], object], kinds: tuple[type[Exception], ...]) -> str | None:
    """What twenty answers end in: its type and words. An exception would keep a session alive."""
    try:
        for _ in range(20):
            answer()
    except kinds as error:
        return f"{type(error).__name__}: {error}"
    return None


def is_expected(kind: str, error: str | None, model: Path) -> bool:
    """Whether it says what happened, and to which file of the model."""
    words = EXPECTED[kind]
    if not words or error is None:
        return not words and error is None
    files = [model] if model.is_file() else model.glob("experts-*.safetensors")
    is_named = any(path.name in error for path in files)
    return is_named and any(word in error for word in words)
