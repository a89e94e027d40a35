"""Bodies of experts whose shadows had to do: brought in for the tokens to come, by another thread.

Which of them get a slot is decided on the model's thread, in the order in which they were missed;
only reading them is left to the other thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.policy import AdmissionRule
from edge_moe.runtime.slot_entry import Entry
from edge_moe.runtime.stalls import Miss


class BodyReader:
    """One per session. All but the reading itself belongs to the model's thread."""

    def __init__(
        self, cache: ExpertCache, bytes_per_second: float, *, is_repeatable: bool = False
    ) -> None:
        """With `is_repeatable` there is no other thread, and the rate stays as it is given."""
        self._cache = cache
        self._is_repeatable = is_repeatable
        self._rule = AdmissionRule(bytes_per_second=bytes_per_second)
        self._queue: queue.SimpleQueue[tuple[Miss, Entry] | None] = queue.SimpleQueue()
        self._queued_bytes = 0
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._last = (time.perf_counter(), 0.0)
        self._thread: threading.Thread | None = None
        if not is_repeatable:
            self._thread = threading.Thread(target=self._run, name="edge-moe-bodies", daemon=True)
            self._thread.start()

    @property
    def bytes_per_second(self) -> float:
        """How fast bodies arrive, as far as is known."""
        return self._rule.bytes_per_second

    def start_token(self) -> None:
        """A token's first layer is about to be computed.

        Raises:
            PackageError, OSError: a body could not be read since the last call.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        now, stalled = time.perf_counter(), self._cache.statistics.stall_seconds
        before, stalled_before = self._last
        with self._lock:
            self._rule.learn_busy(stalled - stalled_before, now - before)
        self._last = now, stalled

    def want(self, misses: Sequence[Miss]) -> None:
        """A layer is computed without these: give a slot to those worth it, and have them read.

        The rule that admits guesses of the next layer's experts admits them, with a token's time
        in place of a layer's: that is when they are next asked for, at the earliest.
        """
        for miss in misses:
            if not self._admits(miss):
                self._cache.statistics.prefetch_rejected += 1
                continue
            entry = self._cache.claim(miss.key)
            if entry is None:
                continue
            if self._is_repeatable:
                self._failure = self._cache.fill_claimed(miss.key, entry) or self._failure
                continue
            with self._lock:
                self._queued_bytes += miss.record_bytes
            self._queue.put((miss, entry))

    def close(self) -> None:
        """Stop the thread; what is being read, or queued, is finished first."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _admits(self, miss: Miss) -> bool:
        if self._is_repeatable:
            return True
        with self._lock:
            return self._rule.admits(miss.key[0], miss.record_bytes, self._queued_bytes)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            miss, entry = item
            start = time.perf_counter()
            failure = self._cache.fill_claimed(miss.key, entry)
            with self._lock:
                self._queued_bytes -= miss.record_bytes
                if failure is None:
                    self._rule.learn_transfer(miss.record_bytes, time.perf_counter() - start)
                else:
                    self._failure = failure
