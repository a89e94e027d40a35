"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path


def available_memory_bytes() -> int | None:
    """Memory this process may still take: the machine's, or its cgroup's if that has less.

    None where there is no /proc/meminfo.
    """
    try:
        machine = _numbers(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    except (OSError, KeyError):
        return None
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        stat = _numbers(cgroup / "memory.stat")
    except (OSError, ValueError):  # version 1, the root group, or no limit ("max")
        return machine
    return min(machine, limit - used + stat.get("inactive_file", 0) + stat.get("active_file", 0))


def _numbers(path: Path) -> dict[str, int]:
    """First two columns of a file such as /proc/meminfo."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows}
