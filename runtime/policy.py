"""Which expert leaves, and whether a guess is worth its bytes. Integers only, never a tensor.

The same classes can be replayed over a recorded trace: they know keys, sizes and seconds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

Key = tuple[int, int]
"""(MoE layer index, router row) of a kept expert."""


class EvictionPolicy(ABC):
    """Chooses which resident expert makes room.

    Contract: `use` is called for every routed expert, hit or miss; `choose` returns one of the
    candidates and changes nothing; `forget` is called when a key leaves.
    """

    name: str

    @abstractmethod
    def use(self, key: Key) -> None:
        """`key` was routed to."""

    @abstractmethod
    def choose(self, candidates: Collection[Key]) -> Key:
        """The candidate to evict. `candidates` is not empty."""

    @abstractmethod
    def forget(self, key: Key) -> None:
        """`key` was evicted."""


class LeastRecentlyUsed(EvictionPolicy):
    """Evicts what was used longest ago; what was never used goes first."""

    name = "lru"

    def __init__(self) -> None:
        self._order: OrderedDict[Key, None] = OrderedDict()

    def use(self, key: Key) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def choose(self, candidates: Collection[Key]) -> Key:
        wanted = set(candidates)
        never_used = wanted - self._order.keys()
        if never_used:
            return min(never_used)
        return next(key for key in self._order if key in wanted)

    def forget(self, key: Key) -> None:
        self._order.pop(key, None)


class LeastFrequentlyUsed(EvictionPolicy):
    """Evicts what was routed to least often. For caches smaller than one token cycle.

    There LRU hits nothing: every expert is evicted before the next token comes back to its layer.
    Of equals the most recently used goes: a cycle needs it again last.
    """

    name = "frequency"

    def __init__(self) -> None:
        self._uses: Counter[Key] = Counter()
        self._last_use: dict[Key, int] = {}
        self._clock = 0

    def use(self, key: Key) -> None:
        self._clock += 1
        self._uses[key] += 1
        self._last_use[key] = self._clock

    def choose(self, candidates: Collection[Key]) -> Key:
        return min(candidates, key=lambda key: (self._uses[key], -self._last_use.get(key, 0)))

    def forget(self, key: Key) -> None:
        pass  # frequency outlives residence


def token_cycle_bytes(largest_record_bytes: Iterable[int], top_k: int) -> int:
    """Bytes that one token touches: over all MoE layers, top_k x the layer's largest record."""
    return top_k * sum(largest_record_bytes)


def choose_policy(slot_bytes: int, cycle_bytes: int) -> EvictionPolicy:
    """LRU, or frequency order where the cache is below one token cycle."""
    return LeastFrequentlyUsed() if slot_bytes < cycle_bytes else LeastRecentlyUsed()


@dataclass
class PagingStatistics:
    """What paging did since the session was opened. Bytes are packed bytes."""

    hits: int = 0
    """Routed experts that were in a slot when asked for."""
    misses: int = 0
    evictions: int = 0
    page_in_bytes: int = 0
    """Read on demand or ahead of it."""
    page_in_seconds: float = 0.0
    stall_seconds: float = 0.0
    """Time the model waited for experts."""
    prefetch_issued_bytes: int = 0
    prefetch_useful_bytes: int = 0
    """Prefetched in time and then used."""
    prefetch_late_bytes: int = 0
    """Used, but the model had to wait for the rest of the transfer."""
    prefetch_wasted_bytes: int = 0
    """Evicted without use."""
    prefetch_rejected: int = 0
    """Guesses that the admission rule found not worth their bytes."""
    predicted_misses: int = 0
    """Guessed experts that were not resident when guessed."""
    predicted_misses_used: int = 0
    """... and that the next layer really asked for: precision on misses is the ratio."""
    host_hits: int = 0
    """Page-ins served by the host tier instead of the disk."""

    @property
    def hit_rate(self) -> float:
        """Share of routed experts that were resident; 1.0 when nothing was routed."""
        total = self.hits + self.misses
        return self.hits / total if total else 1.0


@dataclass
class AdmissionRule:
    """Admit a prefetch only when the time it may save exceeds what its bytes cost now.

    saved = precision x load_seconds: chance that the guess is a miss avoided, times the stall.
    cost  = (1 - precision) x load_seconds x busy + queued_bytes / bytes_per_second: a wrong guess
    delays demand reads when the link is busy, and a queue delays this one beyond its use.
    Precision is tracked per layer on misses, as an exponential mean that starts optimistic.
    """

    decay: float = 0.95
    precision: dict[int, float] = field(default_factory=dict)
    bytes_per_second: float = 1e9
    busy: float = 0.0
    """Share of recent time during which the link was reading on demand, 0..1."""

    def admits(self, layer: int, record_bytes: int, queued_bytes: int) -> bool:
        """Whether to read a guessed miss of `layer` ahead of demand."""
        load_seconds = record_bytes / self.bytes_per_second
        precision = self.precision.get(layer, 0.8)
        cost = (1 - precision) * load_seconds * self.busy + queued_bytes / self.bytes_per_second
        return precision * load_seconds > cost

    def learn_precision(self, layer: int, used: bool) -> None:
        """A guessed miss of `layer` was (not) asked for."""
        known = self.precision.get(layer, 0.8)
        self.precision[layer] = self.decay * known + (1 - self.decay) * used

    def learn_transfer(self, num_bytes: int, seconds: float) -> None:
        """A record took `seconds` to arrive."""
        if seconds > 0:
            rate = num_bytes / seconds
            self.bytes_per_second = self.decay * self.bytes_per_second + (1 - self.decay) * rate

    def learn_busy(self, stalled_seconds: float, step_seconds: float) -> None:
        """Of the last step's time, `stalled_seconds` went into demand reads."""
        if step_seconds > 0:
            share = min(1.0, stalled_seconds / step_seconds)
            self.busy = self.decay * self.busy + (1 - self.decay) * share
