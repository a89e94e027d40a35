"""What a search has measured: plans that may be taken, and probes that only teach.

No torch here: measuring is handed in. A pass over the layers measures several plans at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from edge_moe.problem import IntArray, Problem

OnShare = Callable[[float], None]
"""Is told how much of something is done, 0 to 1."""
Measure = Callable[[Mapping[str, IntArray], OnShare], Mapping[str, float]]
"""Choices [L, E] by name -> mean KL divergence in nats per token.

Calls the second argument with the share of the pass that is done; what that raises goes through.
"""

MAX_PASS_PROPOSALS = 12
"""Plans that are measured together, in one pass over the layers."""


class TimeUp(Exception):
    """The search's time is over; what was measured before counts."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One measured plan."""

    name: str
    choice: IntArray
    kld: float


class Trials:
    """What was measured so far; a choice is measured once, whoever proposes it."""

    def __init__(
        self,
        problem: Problem,
        measure: Measure,
        seconds: float,
        on_share: OnShare = lambda _: None,
    ) -> None:
        """`on_share` is told the share of `seconds` that has passed, within passes, too."""
        self._problem = problem
        self._measure = measure
        self._seconds = seconds
        self._on_share = on_share
        self._known: dict[bytes, float] = {}
        self.restart_clock()
        self.results: list[Trial] = []
        self.seconds_per_plan = 0.0
        """Of the last pass."""

    def restart_clock(self) -> None:
        """All of the time is left."""
        self._deadline = time.monotonic() + self._seconds

    @property
    def left_seconds(self) -> float:
        return self._deadline - time.monotonic()

    @property
    def best(self) -> Trial:
        return min(self.results, key=lambda trial: trial.kld)

    def add(self, proposals: Mapping[str, IntArray]) -> bool:
        """Measure what is new, fits and keeps the rules; whether the best changed.

        Raises:
            TimeUp: after the first plan, when no time is left.
        """
        before = self.best.kld if self.results else np.inf
        tried = {_key(trial.choice) for trial in self.results}
        waiting: dict[bytes, tuple[str, IntArray]] = {}
        for name, choice in proposals.items():
            key = _key(choice)
            if key not in tried and key not in waiting and self._may_be_taken(choice):
                waiting[key] = name, choice
        for part in passes(dict(waiting.values())):
            if self.results and self.left_seconds < 0:
                raise TimeUp
            found = self.probe(part)
            self.results += [Trial(name, part[name], kld) for name, kld in found.items()]
        return bool(self.results) and self.best.kld < before

    def add_all(self, proposals: Iterator[tuple[str, IntArray]]) -> None:
        """Measure a pass's worth at a time: solving, too, takes of the time."""
        while part := dict(islice(proposals, MAX_PASS_PROPOSALS)):
            self.add(part)

    def probe(self, choices: Mapping[str, IntArray]) -> Mapping[str, float]:
        """Measure one pass's worth, whether it fits or not; none of it can become the best.

        Raises:
            TimeUp: the time ran out before the last layer.
        """
        keys = {name: _key(choice) for name, choice in choices.items()}
        new = {name: choices[name] for name, key in keys.items() if key not in self._known}
        if new:
            start = time.monotonic()
            found = self._measure(new, self._check_time)
            self.seconds_per_plan = (time.monotonic() - start) / len(new)
            self._known |= {keys[name]: kld for name, kld in found.items()}
        return {name: self._known[key] for name, key in keys.items()}

    def _check_time(self, share_of_pass: float) -> None:
        passed = 1 - self.left_seconds / self._seconds
        self._on_share(min(1.0, passed))
        if passed > 1 and share_of_pass < 1:
            raise TimeUp

    def _may_be_taken(self, choice: IntArray) -> bool:
        allowed = np.take_along_axis(self._problem.allowed, choice[..., None], axis=-1).all()
        return bool(allowed) and self._problem.bytes_of(choice) <= self._problem.budget_bytes


def _key(choice: IntArray) -> bytes:
    return choice.astype(np.int16).tobytes()


def passes(choices: Mapping[str, IntArray]) -> Iterator[dict[str, IntArray]]:
    """`choices`, as many at a time as are measured together."""
    names = list(choices)
    for start in range(0, len(names), MAX_PASS_PROPOSALS):
        yield {name: choices[name] for name in names[start : start + MAX_PASS_PROPOSALS]}
