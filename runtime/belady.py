"""Belady's rule: evict what is needed last. A bound, for it takes a trace to know the future."""

from __future__ import annotations

from collections.abc import Iterable

from edge_moe.runtime.policy import Key, RankedPolicy

_NEVER = 2**62


class Belady(RankedPolicy):
    """Evicts the resident whose next use is farthest away (Belady 1966, algorithm MIN).

    No order of experts of one size hits more often when nothing is read ahead.
    """

    name = "belady"

    def __init__(self, future: Iterable[Key]) -> None:
        """`future` are all coming uses, in order; only such keys may be used, and in that order."""
        super().__init__()
        self._coming: dict[Key, list[int]] = {}
        for time, key in enumerate(future):
            self._coming.setdefault(key, []).append(time)
        for times in self._coming.values():
            times.reverse()  # the next one is last

    def admit(self, key: Key) -> None:
        times = self._coming.get(key)
        self._place(key, -(times[-1] if times else _NEVER))

    def use(self, key: Key) -> None:
        self._coming[key].pop()
        self.admit(key)
