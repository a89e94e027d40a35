"""Which part of Belady's hits takes foreknowledge, and of how many tokens."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from pydantic import BaseModel, ConfigDict

from edge_moe.runtime.belady import Belady
from edge_moe.runtime.policy import EvictionPolicy, Key
from edge_moe.runtime.replay import Residents, Room
from edge_moe.runtime.simulate import Replay
from edge_moe.runtime.trace import Trace

SEEN_STEPS = (0, 1, 2, 4, 8, 16)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Seen(_Model):
    """An oracle that knows some steps."""

    num_steps: int
    """Of a token each, when decoding. 0 is the policy alone."""
    hits: int
    hit_rate: float
    belady_share: float
    """Of the hits of Belady's rule."""


class Forgetful(_Model):
    """Hit rates where every token chooses for itself, with the trace's counts; see `shuffled`."""

    policy: float
    fixed: float
    """What no causal order is expected to exceed; see `fixed_hits`."""
    belady: float


class ForesightResult(_Model):
    """What foreknowledge is worth for one size of memory."""

    seen: tuple[Seen, ...]
    forgetful: Forgetful


@dataclass
class Sight:
    """How far an oracle sees."""

    end: int = 0
    """The first use, counted from the start of the trace, that it does not know."""


class Foresight(Belady):
    """Belady's rule with a horizon: whoever is not needed before it leaves first.

    Those leave in the order of another policy, which learns what happens as it does without the
    oracle; only where all are needed before the horizon the one needed last goes.
    """

    name = "foresight"

    def __init__(self, future: Sequence[Key], sight: Sight, beyond: EvictionPolicy) -> None:
        """`future` as Belady's; `beyond` orders those that are needed later than `sight` tells."""
        super().__init__(future)
        self._sight = sight
        self._beyond = beyond
        self._out_of_sight: set[Key] = set()
        self._next: list[tuple[int, Key]] = []
        """A heap of next uses; some are outdated."""

    def admit(self, key: Key) -> None:
        self._beyond.admit(key)
        self._out_of_sight.add(key)
        self._watch(key)

    def use(self, key: Key) -> None:
        self._coming[key].pop()
        if key not in self._out_of_sight:
            super().forget(key)
            self._beyond.admit(key)
            self._out_of_sight.add(key)
        self._beyond.use(key)
        self._watch(key)

    def forget(self, key: Key) -> None:
        if key in self._out_of_sight:
            self._out_of_sight.remove(key)
            self._beyond.forget(key)
        else:
            super().forget(key)

    def victim(self, may_evict: Callable[[Key], bool]) -> Key | None:
        self._look()
        found = self._beyond.victim(may_evict)
        return found if found is not None else super().victim(may_evict)

    def _watch(self, key: Key) -> None:
        times = self._coming.get(key)
        if times:
            heapq.heappush(self._next, (times[-1], key))

    def _look(self) -> None:
        while self._next and self._next[0][0] < self._sight.end:
            time, key = heapq.heappop(self._next)
            if key in self._out_of_sight and self._coming[key][-1:] == [time]:
                self._out_of_sight.remove(key)
                self._beyond.forget(key)
                super().admit(key)


class WorthOfForesight:
    """Asks an oracle about one trace, for one size of memory after another."""

    def __init__(self, replay: Replay, policy: type[EvictionPolicy], seed: int = 0) -> None:
        """`policy` orders what the oracle does not see; `seed` is that of `shuffled`."""
        self._replay = replay
        self._policy = policy
        self._shuffled = Replay(shuffled(replay.trace, seed), replay.sizes)

    def result(self, room: Room, advance: Callable[[], None] = lambda: None) -> ForesightResult:
        """`advance` is called after each of `SEEN_STEPS`.

        Raises:
            InputError: no slot at all for a size, or too few for one step.
        """
        bound = self._replay.run(room, Belady)
        total, seen = max(bound.hits + bound.misses, 1), []
        for num_steps in SEEN_STEPS:
            hits = foresight_hits(self._replay, room, self._policy, num_steps)
            seen.append(
                Seen(
                    num_steps=num_steps,
                    hits=hits,
                    hit_rate=hits / total,
                    belady_share=hits / bound.hits if bound.hits else 1.0,
                )
            )
            advance()
        forgetful = Forgetful(
            policy=self._shuffled.run(room, self._policy).hit_rate,
            fixed=fixed_hits(self._shuffled, room) / total,
            belady=self._shuffled.run(room, Belady).hit_rate,
        )
        return ForesightResult(seen=tuple(seen), forgetful=forgetful)


def foresight_hits(
    replay: Replay, room: Room, policy: type[EvictionPolicy], num_steps: int | None
) -> int:
    """Hits of an oracle that knows the next `num_steps` steps, of a token each when decoding.

    A step ahead is as many layers ahead as there are, so that one step tells of every expert
    whether the next visit of its layer needs it. 0 is `policy` itself, None is Belady's rule.

    Raises:
        InputError: no slot at all for a size, or too few for one step.
    """
    asks = replay.asks(room.most_tokens)
    future = [(ask.layer, row) for ask in asks for row in ask.rows]
    ends = list(accumulate(len(ask.rows) for ask in asks))
    ahead = len(asks) if num_steps is None else num_steps * len(replay.sizes)
    sight, misses = Sight(), 0
    residents = Residents(replay.sizes, room, lambda: Foresight(future, sight, policy()))
    for place, ask in enumerate(asks):
        sight.end = ends[min(place + ahead, len(ends) - 1)] if ahead else 0
        misses += len(residents.ask(ask.layer, ask.rows))
    return len(future) - misses


def fixed_hits(replay: Replay, room: Room) -> int:
    """Hits of the best experts to keep for ever, in hindsight; the one that passes is not counted.

    Where a router has no memory, and no layer tells of another, no causal order that reads on
    demand is expected to hit more often: who is there when its layer comes again was there all the
    time, so a cycle's hits are expected to be at most the shares of who is there when it begins.
    """
    asks = replay.asks(room.most_tokens)
    counts = Counter((ask.layer, row) for ask in asks for row in ask.rows)
    left = dict(room.limit_bytes)
    hits = 0.0

    def worth(key: Key) -> tuple[float, Key]:
        return -counts[key] / replay.sizes[key[0]][key[1]], key

    for key in sorted(counts, key=worth):
        size = replay.sizes[key[0]][key[1]]
        pool = room.pool_of[size]
        taken = min(size, left[pool])  # sizes may differ in a pool: the last one counts in part
        left[pool] -= taken
        hits += counts[key] * taken / size
    return int(hits)


def shuffled(trace: Trace, seed: int = 0) -> Trace:
    """`trace` with the steps of one token of every layer in an order of its own.

    Counts stay, and experts that are chosen together in a layer; what a token tells of the next, or
    a layer of another, is gone. Prompts stay where they are.
    """
    generator = np.random.default_rng(seed)
    single = np.repeat(trace.step_tokens == 1, trace.step_tokens)
    places = np.flatnonzero(single)
    rows = trace.rows.copy()
    for layer in range(rows.shape[1]):
        rows[places, layer] = trace.rows[generator.permutation(places), layer]
    return replace(trace, rows=rows, guesses={})
