"""`HeldInterrupts`: Ctrl-C waits for the end of a block that must not stop half-way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class HeldInterrupts:
    """Notes SIGINT while blocks run, which may lie in one another. For one thread at a time.

    Threads but the main one are never interrupted. A handler that is not Python's own stays.
    """

    def __init__(self) -> None:
        self.has_come = False
        """Whether the block that runs is to be interrupted, at its end at the latest."""
        self._is_holding = False

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Run a block.

        Raises:
            KeyboardInterrupt: at its end, where it came meanwhile.
        """
        is_main = threading.current_thread() is threading.main_thread()
        if self._is_holding or not is_main or not _is_default_handler():
            yield
            return

        def note(*_: object) -> None:
            self.has_come = True

        self._is_holding, self.has_come = True, False
        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self._is_holding, has_come = False, self.has_come
            self.has_come = False
            if has_come:
                raise KeyboardInterrupt


def _is_default_handler() -> bool:
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler
