"""Belady's rule: evict what is needed last. A bound, for it takes a trace to know the future."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

from edge_moe.runtime.policy import EvictionPolicy, Key

_NEVER = 2**62


class Belady(EvictionPolicy):
    """Evicts the resident whose next use is farthest away (Belady 1966, algorithm MIN).

    No order of experts of one size hits more often when nothing is read ahead. A choice takes
    logarithmic time: a heap, whose outdated items are skipped.
    """

    name = "belady"

    def __init__(self, future: Iterable[Key]) -> None:
        """`future` are all coming uses, in order; only such keys may be used, and in that order."""
        self._coming: dict[Key, list[int]] = {}
        for time, key in enumerate(future):
            self._coming.setdefault(key, []).append(time)
        for times in self._coming.values():
            times.reverse()  # the next one is last
        self._next: dict[Key, int] = {}  # resident key -> time of its next use
        self._heap: list[tuple[int, Key]] = []

    def admit(self, key: Key) -> None:
        self._place(key)

    def use(self, key: Key) -> None:
        self._coming[key].pop()
        self._place(key)

    def forget(self, key: Key) -> None:
        del self._next[key]

    def victim(self, may_evict: Callable[[Key], bool]) -> Key | None:
        looked_at, found = [], None
        while self._heap and found is None:
            item = heapq.heappop(self._heap)
            key = item[1]
            if self._next.get(key) != -item[0]:
                continue
            looked_at.append(item)
            found = key if may_evict(key) else None
        for item in looked_at:
            heapq.heappush(self._heap, item)
        return found

    def _place(self, key: Key) -> None:
        times = self._coming.get(key)
        self._next[key] = time = times[-1] if times else _NEVER
        heapq.heappush(self._heap, (-time, key))
