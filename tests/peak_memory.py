"""What a piece of code adds to the memory of a new process that has imported what it needs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import make_tiny_checkpoint

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")

_AROUND = """
def kilobytes(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

before = kilobytes("VmRSS:")
{work}
print((kilobytes("VmHWM:") - before) * 1024)
"""


def deep_checkpoint(folder: Path) -> Path:
    """Twelve layers of experts, so that one layer is a small part of the model."""
    return make_tiny_checkpoint(
        folder,
        "olmoe",
        width=256,
        num_hidden_layers=12,
        num_experts=16,
        intermediate_size=1024,
    )


@dataclass(frozen=True)
class Peak:
    grown_bytes: int
    printed: list[str]
    """Lines that the work printed."""
    stderr: str


def measure_peak(imports: str, work: str, *arguments: object) -> Peak:
    """Run `work` after `imports`; `arguments` are its sys.argv[1:].

    Not getrusage's peak: that of a new process starts at what its parent held.
    """
    code = imports + _AROUND.format(work=work)
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
    )
    *printed, grown = process.stdout.splitlines()
    return Peak(int(grown), printed, process.stderr)
