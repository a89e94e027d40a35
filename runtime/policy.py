"""Which expert leaves, and whether a guess is worth its bytes. Integers only, never a tensor.

The same classes can be replayed over a recorded trace: they know keys, sizes and seconds.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

Key = tuple[int, int]
"""(MoE layer index, router row) of a kept expert."""


class EvictionPolicy(ABC):
    """Orders the resident experts of one size class by who leaves first.

    Contract: `admit` is called when a key gets a slot, `use` for every routed expert that has one,
    `forget` when it leaves; `victim` changes nothing.
    """

    name: str

    @classmethod
    def order_bytes(cls, num_layers: int, num_rows: int) -> int:
        """Memory over so many layers of `num_rows` experts; 0: a few numbers per resident."""
        return 0

    @abstractmethod
    def admit(self, key: Key) -> None:
        """`key` got a slot."""

    @abstractmethod
    def use(self, key: Key) -> None:
        """The resident `key` was routed to."""

    def use_all(self, layer: int, rows: Sequence[int]) -> None:
        """One token, or one step, was routed to these residents of a layer, in this order."""
        for row in rows:
            self.use((layer, row))

    @abstractmethod
    def forget(self, key: Key) -> None:
        """`key` was evicted."""

    @abstractmethod
    def victim(self, may_evict: Callable[[Key], bool]) -> Key | None:
        """The resident expert to evict; None where `may_evict` refuses them all."""


class LeastRecentlyUsed(EvictionPolicy):
    """Evicts what was used, or read ahead, longest ago. A choice takes constant time."""

    name = "lru"

    def __init__(self) -> None:
        self._order: OrderedDict[Key, None] = OrderedDict()

    def admit(self, key: Key) -> None:
        self._order[key] = None

    def use(self, key: Key) -> None:
        self._order.move_to_end(key)

    def forget(self, key: Key) -> None:
        del self._order[key]

    def victim(self, may_evict: Callable[[Key], bool]) -> Key | None:
        return next(filter(may_evict, self._order), None)


class RankedPolicy(EvictionPolicy):
    """Evicts the resident of the lowest rank. A choice takes logarithmic time.

    A heap, whose outdated items are skipped, and thrown out when they are too many.
    """

    def __init__(self) -> None:
        self._rank: dict[Key, tuple[int, ...]] = {}  # of residents
        self._heap: list[tuple[tuple[int, ...], Key]] = []

    def forget(self, key: Key) -> None:
        del self._rank[key]

    def victim(self, may_evict: Callable[[Key], bool]) -> Key | None:
        try:
            return self._find_victim(may_evict)
        except BaseException:  # Ctrl-C may come at any line: what is in no heap would never leave
            self._renew_heap()
            raise

    def _find_victim(self, may_evict: Callable[[Key], bool]) -> Key | None:
        looked_at, found = [], None
        while self._heap and found is None:
            item = heapq.heappop(self._heap)
            rank, key = item
            if self._rank.get(key) != rank:
                continue
            looked_at.append(item)
            found = key if may_evict(key) else None
        for item in looked_at:
            heapq.heappush(self._heap, item)
        return found

    def _place(self, key: Key, *rank: int) -> None:
        """Of equals the smallest key leaves first."""
        heapq.heappush(self._heap, (rank, key))
        self._rank[key] = rank  # last: after Ctrl-C the one before holds, in the heap as well
        if len(self._heap) > 4 * len(self._rank) + 64:
            self._renew_heap()

    def _renew_heap(self) -> None:
        """Of the residents' ranks, and no others."""
        heap = [(rank, key) for key, rank in self._rank.items()]
        heapq.heapify(heap)
        self._heap = heap


class LeastFrequentlyUsed(RankedPolicy):
    """Evicts what was routed to least often.

    Below one token cycle it still hits, where LRU evicts every expert before the next token comes
    back to its layer. Of equals the most recently used goes: a cycle needs it again last. Frequency
    outlives residence.
    """

    name = "frequency"

    def __init__(self) -> None:
        super().__init__()
        self._uses: Counter[Key] = Counter()
        self._clock = 0

    def admit(self, key: Key) -> None:
        self._place(key, self._uses[key], 0)

    def use(self, key: Key) -> None:
        self._clock += 1
        self._uses[key] += 1
        self._place(key, self._uses[key], -self._clock)


def token_cycle_bytes(largest_record_bytes: Iterable[int], top_k: int) -> int:
    """Bytes that one token touches: over all MoE layers, top_k x the layer's largest record."""
    return top_k * sum(largest_record_bytes)


@dataclass(frozen=True)
class RoutedCounts:
    """What the routers chose over some tokens and layers, each token counted for itself."""

    routed_experts: int = 0
    skipped_experts: int = 0
    """... of which a skipping rule left out."""
    routed_bytes: int = 0
    """Packed bytes of the chosen experts."""
    skipped_bytes: int = 0
    """... and of those left out."""

    def since(self, earlier: RoutedCounts) -> RoutedCounts:
        """What was counted after `earlier`."""
        return RoutedCounts(
            self.routed_experts - earlier.routed_experts,
            self.skipped_experts - earlier.skipped_experts,
            self.routed_bytes - earlier.routed_bytes,
            self.skipped_bytes - earlier.skipped_bytes,
        )


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
    """Time in which experts were being read, however many at once."""
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
    cpu_experts: int = 0
    """Misses that were computed on the CPU, beside a GPU, without a slot."""
    cpu_bytes: int = 0
    """Their packed bytes, which were not moved."""
    routed_experts: int = 0
    """Experts that the routers chose, over all tokens and layers."""
    skipped_experts: int = 0
    """... of which a skipping rule left out."""
    routed_bytes: int = 0
    """Packed bytes of the chosen experts, each token counted for itself; with a rule only."""
    skipped_bytes: int = 0
    """... and of those left out, resident or not."""
    not_paged_bytes: int = 0
    """Experts that a step did not need any more, and that had no slot at that moment."""

    shadow_experts: int = 0
    """Misses of decoded tokens that were computed from shadows."""
    shadow_weight: float = 0.0
    """Their router weights, added up without sign."""
    decoded_weight: float = 0.0
    """The same of all experts that decoded tokens chose; counted where shadows are in use."""

    @property
    def page_in_rate(self) -> float:
        """Bytes per second; 1e9 where nothing was read."""
        if not (self.page_in_bytes and self.page_in_seconds):
            return 1e9
        return self.page_in_bytes / self.page_in_seconds

    @property
    def shadow_share(self) -> float:
        """Share of decoded tokens' router weight that shadows computed."""
        return self.shadow_weight / self.decoded_weight if self.decoded_weight else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of routed experts that were resident; 1.0 when nothing was routed."""
        total = self.hits + self.misses
        return self.hits / total if total else 1.0

    @property
    def routed(self) -> RoutedCounts:
        """What the routers chose so far; its bytes are counted with a skipping rule only."""
        return RoutedCounts(
            self.routed_experts, self.skipped_experts, self.routed_bytes, self.skipped_bytes
        )


@dataclass
class AdmissionRule:
    """Admit a prefetch only when the time it may save exceeds what its bytes cost now.

    saved = precision x min(load_seconds, layer_seconds - queued_bytes / bytes_per_second): chance
    that the guess is a miss avoided, times what of its load the layer's compute hides once the
    queue before it is done. A link that is too slow for the compute hides nothing.
    cost  = (1 - precision) x load_seconds x busy: a wrong guess delays demand reads when the link
    is busy.
    Precision is tracked per layer on misses, as an exponential mean that starts optimistic.
    """

    decay: float = 0.95
    precision: dict[int, float] = field(default_factory=dict)
    bytes_per_second: float = 1e9
    busy: float = 0.0
    """Share of recent time during which the link was reading on demand, 0..1."""
    layer_seconds: float = math.inf
    """From one layer's experts being there to the next layer asking; unknown at first."""

    def admits(self, layer: int, record_bytes: int, queued_bytes: int) -> bool:
        """Whether to read a guessed miss of `layer` ahead of demand."""
        load_seconds = record_bytes / self.bytes_per_second
        precision = self.precision.get(layer, 0.8)
        hidden = min(load_seconds, self.layer_seconds - queued_bytes / self.bytes_per_second)
        return precision * hidden > (1 - precision) * load_seconds * self.busy

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
        if step_seconds <= 0:
            return
        share = min(1.0, stalled_seconds / step_seconds)
        self.busy = self.decay * self.busy + (1 - self.decay) * share
        known, free = self.layer_seconds, max(0.0, step_seconds - stalled_seconds)
        is_known = math.isfinite(known)
        self.layer_seconds = self.decay * known + (1 - self.decay) * free if is_known else free
