"""The entry point of the command: Ctrl-C ends it quietly even while the imports are under way."""

from __future__ import annotations

import sys


def main() -> None:
    """Run `sys.argv` and exit with the command's code."""
    try:
        from edge_moe.cli import main as run_command_line

        run_command_line()
    except KeyboardInterrupt:
        sys.exit(130)
