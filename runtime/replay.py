"""`Residents`: the bookkeeping of the engines' caches without bytes, threads and torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from edge_moe.errors import InputError
from edge_moe.runtime.policy import EvictionPolicy, Key


@dataclass(frozen=True)
class Room:
    """Memory for experts, as an engine divides it. Sizes are what an expert takes in memory."""

    pool_of: Mapping[int, int]
    """Pool that an expert of each size lives in."""
    limit_bytes: Mapping[int, int]
    """By pool."""
    num_slots: int
    """Experts that fit, of the largest size where they differ within a pool."""
    is_filled: bool
    """Whether the engine reads experts in layer order, as many as fit, before the first token."""
    comes_together: bool
    """Whether a layer's experts are asked for at once, so that none leaves for another; those that
    are there count as used first. Else they come one by one, in the order of rows."""
    most_tokens: int | None = None
    """Tokens computed at once, so that what they choose fits together; None: a step's."""

    @classmethod
    def of_slots(cls, counts: Mapping[int, int]) -> Room:
        """The native engine: `counts` slots per record size, each size with an order of its own."""
        return cls(
            {size: size for size in counts},
            {size: size * count for size, count in counts.items()},
            sum(counts.values()),
            is_filled=True,
            comes_together=False,
        )

    @classmethod
    def of_bytes(
        cls, limit_bytes: int, sizes: Sequence[Sequence[int]], most_tokens: int | None = None
    ) -> Room:
        """The GGUF engine: one limit for experts of [L][rows] `sizes`; it fills what fits whole."""
        every = [size for layer in sizes for size in layer]
        return cls(
            dict.fromkeys(every, 0),
            {0: limit_bytes},
            min(len(every), limit_bytes // max(every)),
            is_filled=sum(every) <= limit_bytes,
            comes_together=True,
            most_tokens=most_tokens,
        )

    @property
    def num_bytes(self) -> int:
        """Over all pools."""
        return sum(self.limit_bytes.values())


class Residents:
    """Who is in memory while a trace is replayed."""

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        room: Room,
        policy: Callable[[], EvictionPolicy],
    ) -> None:
        """`sizes` [L][rows]; every pool gets a `policy` of its own.

        Raises:
            InputError: a size without a pool.
        """
        self._sizes = sizes
        self._room = room
        self._policies = {pool: policy() for pool in room.limit_bytes}
        self._used_bytes = dict.fromkeys(room.limit_bytes, 0)
        self._keys: set[Key] = set()
        self.evictions = 0
        self.is_busy: Callable[[Key], bool] = lambda _: False
        """Whether an expert may not leave, for it is being read."""
        self.on_evicted: Callable[[Key], None] = lambda _: None
        for size in {size for layer in sizes for size in layer} - room.pool_of.keys():
            raise InputError(f"no slot holds experts of {size} bytes: give more slots")
        if room.is_filled:
            self._fill()

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def num_bytes(self, key: Key) -> int:
        """What an expert takes."""
        return self._sizes[key[0]][key[1]]

    def others(self) -> list[Key]:
        """Who is not there, in layer order."""
        every = (
            (layer, row) for layer, sizes in enumerate(self._sizes) for row in range(len(sizes))
        )
        return [key for key in every if key not in self._keys]

    def ask(self, layer: int, rows: Iterable[int]) -> list[Key]:
        """A step needs `rows` of `layer`; those that had to be brought."""
        keys = [(layer, row) for row in rows]
        if self._room.comes_together:
            keep = frozenset(keys)
            missing = [key for key in keys if not self._use(key)]
            self._bring(missing, keep)
            return missing
        missing = []
        for key in keys:
            if not self._use(key):
                self._bring([key], frozenset())
                missing.append(key)
        return missing

    def admit(self, key: Key, keep: frozenset[Key]) -> bool:
        """Bring `key` ahead of its use; False where only experts of `keep` could leave for it."""
        if not self._make_room(self._pool(key), self.num_bytes(key), keep):
            return False
        self._take(key)
        return True

    def drop(self, key: Key) -> None:
        """A resident's memory is free."""
        self._policy(key).forget(key)
        self._keys.remove(key)
        self._used_bytes[self._pool(key)] -= self.num_bytes(key)
        self.on_evicted(key)

    def _use(self, key: Key) -> bool:
        if key not in self._keys:
            return False
        self._policy(key).use(key)
        return True

    def _bring(self, keys: Sequence[Key], keep: frozenset[Key]) -> None:
        """Make room for all of `keys`, which share pools, before one of them is there."""
        sizes: dict[int, int] = {}
        for key in keys:
            sizes[self._pool(key)] = sizes.get(self._pool(key), 0) + self.num_bytes(key)
        for pool, size in sizes.items():
            if not self._make_room(pool, size, keep):
                raise InputError(
                    f"there is no room for {len(keep) or 1} experts together ({size} bytes of them "
                    "are not there): give more slots, or a larger budget"
                )
        for key in keys:
            self._take(key)
        for key in keys:
            self._policy(key).use(key)

    def _take(self, key: Key) -> None:
        self._used_bytes[self._pool(key)] += self.num_bytes(key)
        self._keys.add(key)
        self._policy(key).admit(key)

    def _make_room(self, pool: int, size: int, keep: frozenset[Key]) -> bool:
        limit = self._room.limit_bytes[pool]
        while self._used_bytes[pool] + size > limit:
            victim = self._policies[pool].victim(
                lambda other: other not in keep and not self.is_busy(other)
            )
            if victim is None:
                return False
            self.evictions += 1
            self.drop(victim)
        return True

    def _fill(self) -> None:
        for layer, sizes in enumerate(self._sizes):
            for row, size in enumerate(sizes):
                pool = self._room.pool_of[size]
                if self._used_bytes[pool] + size <= self._room.limit_bytes[pool]:
                    self._take((layer, row))

    def _pool(self, key: Key) -> int:
        return self._room.pool_of[self.num_bytes(key)]

    def _policy(self, key: Key) -> EvictionPolicy:
        return self._policies[self._pool(key)]


class HostResidents:
    """The native engine's tier in RAM between disk and GPU: who passes through stays, LRU."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._sizes: OrderedDict[Key, int] = OrderedDict()
        self._used_bytes = 0

    def fill(self, residents: Residents) -> None:
        """As the engine starts: those that have no slot, in layer order, until it is full."""
        for key in residents.others():
            if self._used_bytes + residents.num_bytes(key) <= self._limit_bytes:
                self.fetch(key, residents.num_bytes(key))

    def fetch(self, key: Key, num_bytes: int) -> bool:
        """Whether `key` was there; it is afterwards, unless it is larger than the tier."""
        if key in self._sizes:
            self._sizes.move_to_end(key)
            return True
        if num_bytes > self._limit_bytes:
            return False
        while self._used_bytes + num_bytes > self._limit_bytes:
            self._used_bytes -= self._sizes.popitem(last=False)[1]
        self._sizes[key] = num_bytes
        self._used_bytes += num_bytes
        return False
