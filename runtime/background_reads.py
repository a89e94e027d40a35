"""`BackgroundReads`: one thread that reads experts into slots ahead of use."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.policy import Key


@dataclass(frozen=True)
class Read:
    """An expert to be read, of `num_bytes`; none of a set in `keeps` leaves for it.

    Sets are tried one after another: what cannot be had with the first may be with the next.
    """

    key: Key
    num_bytes: int
    keeps: tuple[frozenset[Key], ...]
    is_wanted: Callable[[], bool] = lambda: True
    """Asked when its turn has come."""


class BackgroundReads:
    """Whoever submits gets the answers in the thread that reads."""

    def __init__(self, cache: ExpertCache, on_done: Callable[[Read, float | None], None]) -> None:
        """`on_done` is told how many seconds a read took; None where nothing was read."""
        self._cache = cache
        self._on_done = on_done
        self._queue: queue.SimpleQueue[Read | None] = queue.SimpleQueue()
        self._queued_bytes = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="edge-moe-prefetch", daemon=True)
        self._thread.start()

    @property
    def queued_bytes(self) -> int:
        """Experts that are being read, or will be."""
        return self._queued_bytes

    def submit(self, read: Read) -> None:
        """Read it when its turn comes."""
        with self._lock:
            self._queued_bytes += read.num_bytes
        self._queue.put(read)

    def close(self) -> None:
        """Stop the thread; what is being read is finished first."""
        self._queue.put(None)
        self._thread.join()
        self._on_done = _nobody  # who listens holds this, and the slots would wait for a collection

    def _run(self) -> None:
        while (read := self._queue.get()) is not None:
            start, was_read = time.perf_counter(), False
            try:
                if read.is_wanted():
                    was_read = any(self._cache.prefetch(read.key, keep) for keep in read.keeps)
            finally:
                with self._lock:
                    self._queued_bytes -= read.num_bytes
                self._on_done(read, time.perf_counter() - start if was_read else None)


def _nobody(_read: Read, _seconds: float | None) -> None:
    """Listens no more."""
