"""The entry point of the command: Ctrl-C ends it quietly even while the imports are under way."""

from __future__ import annotations

import os
import sys

BLAS_WAIT = "OPENBLAS_THREAD_TIMEOUT"
"""OpenBLAS, numpy's and scipy's: log2 of the clock cycles that idle threads spin before sleep."""


def main() -> None:
    """Run `sys.argv` and exit with the command's code.

    OpenBLAS reads its setting while numpy is imported. Its idle threads spin for a tenth of a
    second by default, on the cores that torch's threads need by then: `calibrate --gradients` on
    the demo model took 84 s on 2 cores, 54 s with the least time.
    """
    os.environ.setdefault(BLAS_WAIT, "4")
    try:
        from edge_moe.cli import main as run_command_line

        run_command_line()
    except KeyboardInterrupt:
        sys.exit(130)
