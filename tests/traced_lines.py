"""Something happens at a certain line of certain files: Ctrl-C, in tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any


@contextmanager
def at_line(line: int, files: Collection[str], happens: Callable[[], object]) -> Iterator[None]:
    """Call `happens` before this thread runs its `line`-th line of `files`, given by name.

    If it raises, Python stops tracing.
    """
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if Path(frame.f_code.co_filename).name not in files:
            return None
        left -= event == "line"
        if left == 0:
            happens()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
