"""Frequency-pinned + LRU: the often used half stays, the others take turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from edge_moe.runtime.policy import Key, LeastRecentlyUsed


class FrequencyPinned(LeastRecentlyUsed):
    """Pins those half of the residents that were used most often; LRU among the others.

    Who is pinned is settled anew after as many uses as four times the residents, so that a choice
    takes constant time on average. A pinned expert leaves only where nothing else may.
    """

    name = "pinned"
    pinned_share = 0.5

    def __init__(self) -> None:
        super().__init__()
        self._uses: Counter[Key] = Counter()
        self._pinned: set[Key] = set()
        self._uses_left = 0

    def use(self, key: Key) -> None:
        super().use(key)
        self._uses[key] += 1
        self._uses_left -= 1
        if self._uses_left < 0:
            self._pin()

    def forget(self, key: Key) -> None:
        super().forget(key)
        self._pinned.discard(key)

    def victim(self, may_evict: Callable[[Key], bool]) -> Key | None:
        found = super().victim(lambda key: key not in self._pinned and may_evict(key))
        return found if found is not None else super().victim(may_evict)

    def _pin(self) -> None:
        count = int(len(self._order) * self.pinned_share)
        often = sorted(self._order, key=lambda key: (-self._uses[key], key))
        self._pinned = set(often[:count])
        self._uses_left = 4 * len(self._order)
