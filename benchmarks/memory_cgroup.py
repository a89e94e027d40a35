"""A memory cgroup (v1) around a command: the kernel kills what takes more than the limit."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup/memory")


def missing_reason() -> str | None:
    """Why no cgroup can be made here, or None."""
    if not (ROOT / "memory.limit_in_bytes").exists():
        return "no cgroup v1 memory controller at /sys/fs/cgroup/memory"
    probe = ROOT / f"edge-moe-probe-{uuid.uuid4().hex[:8]}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return f"memory cgroups cannot be made here: {error}"
    return None


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """A cgroup folder with a hard limit, removed afterwards."""
    group = ROOT / f"edge-moe-{uuid.uuid4().hex[:8]}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield group
    finally:
        group.rmdir()


def peak_bytes(group: Path) -> int:
    """The most that its processes took, pages that they cached included."""
    return int((group / "memory.max_usage_in_bytes").read_text())


def enter(group: Path | None) -> None:
    """Move this process there, unless there is no group."""
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))


def run_in(
    group: Path | None, command: Sequence[str], timeout_seconds: int | None = 300
) -> subprocess.CompletedProcess[str]:
    """Run `command` inside the cgroup, if there is one."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        preexec_fn=lambda: enter(group),
    )
