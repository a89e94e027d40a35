"""What a search has measured: plans that may be taken, and probes that only teach.

No torch here: measuring is handed in. A pass over the layers measures several plans at once.

The mean KL divergence of a good plan hangs on a few tokens, and the best of many plans on one text
is often no better on another. So plans are compared token by token, and one takes another's place
only where the mean difference is several standard errors below zero. On the demo model's held-out
text changes of a plan that passed at 3 were as good on the other half of the text or better, while
those at 1 to 2.3 were up to 4 times worse there (a quarter of the experts' bytes and more).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_moe.problem import FloatArray, IntArray, Problem

OnShare = Callable[[float], None]
"""Is told how much of something is done, 0 to 1."""
Measure = Callable[[Mapping[str, IntArray], OnShare], Mapping[str, FloatArray]]
"""Choices [L, E] by name -> KL divergence of every token [N] in nats, of the same tokens always.

Calls the second argument with the share of the pass that is done; what that raises goes through.
Raises `MeasuringFailed` where the machine, not the plan, is at fault: a full disk, for one.
"""

MAX_PASS_PROPOSALS = 12
"""Plans that are measured together, in one pass over the layers."""
STANDARD_ERRORS = 3.0
"""By so many a plan must be better than the best one before it takes its place."""
SELECTION_RULE = (
    f"the first one stays unless another is better by {STANDARD_ERRORS:g} standard errors of the "
    "difference, token by token"
)


@dataclass(frozen=True)
class Measuring:
    """What `Measure` can do."""

    pass_plans: int = MAX_PASS_PROPOSALS
    """So many are measured together at most."""
    needs_equal_counts: bool = False
    """Every layer of a plan, or a probe, must keep equally many experts."""


class TimeUp(Exception):
    """The search's time is over; what was measured before counts."""


class MeasuringFailed(Exception):
    """No more plans can be measured, and why; what was measured before counts."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One measured plan."""

    name: str
    choice: IntArray
    token_kld: FloatArray
    """[N]"""

    @property
    def kld(self) -> float:
        """Mean over tokens."""
        return float(self.token_kld.mean())


@dataclass(frozen=True)
class Change:
    """Mean difference of two plans' KL divergence over the same tokens, nats per token."""

    mean: float
    error: float
    """Its standard error, tokens taken as independent."""

    @classmethod
    def between(cls, before: FloatArray, after: FloatArray) -> Change:
        difference = after - before
        return cls(float(difference.mean()), float(difference.std() / np.sqrt(difference.size)))

    def upper(self, errors: float) -> float:
        """The mean and `errors` standard errors more."""
        return self.mean + errors * self.error


def surest(base: Trial, others: Sequence[Trial]) -> Trial:
    """The one of `others` that is most surely better than `base`; that itself, if none is sure."""
    best, least = base, 0.0
    for trial in others:
        bound = Change.between(base.token_kld, trial.token_kld).upper(STANDARD_ERRORS)
        if bound < least:
            best, least = trial, bound
    return best


class Trials:
    """What was measured so far; a choice is proposed once, whoever proposes it."""

    def __init__(
        self,
        problem: Problem,
        measure: Measure,
        seconds: float,
        on_share: OnShare = lambda _: None,
        measuring: Measuring | None = None,
    ) -> None:
        """`on_share` is told the share of `seconds` that has passed, within passes, too."""
        self._problem = problem
        self._measure = measure
        self._seconds = seconds
        self._on_share = on_share
        self.measuring = measuring or Measuring()
        self.restart_clock()
        self.results: list[Trial] = []
        self._best: Trial | None = None
        self.seconds_per_plan = 0.0
        """Of the last pass."""
        self.is_cut_short = False
        """Whether something was left out for want of time."""

    def restart_clock(self) -> None:
        """All of the time is left."""
        self._deadline = time.monotonic() + self._seconds

    @property
    def left_seconds(self) -> float:
        return self._deadline - time.monotonic()

    @property
    def best(self) -> Trial:
        """The first plan, or one that was better by `STANDARD_ERRORS`, again and again."""
        if self._best is None:
            raise ValueError("nothing was measured yet")
        return self._best

    def add(self, proposals: Mapping[str, IntArray]) -> bool:
        """Measure what is new, fits and keeps the rules; whether the best changed.

        Raises:
            TimeUp: after the first plan, when no time is left.
        """
        before = self._best
        tried = self._measured_before()
        waiting: dict[bytes, tuple[str, IntArray]] = {}
        for name, choice in proposals.items():
            key = _key(choice)
            if key not in tried and key not in waiting and self._may_be_taken(choice):
                waiting[key] = name, choice
        for part in self.passes(dict(waiting.values())):
            if self.results and self.left_seconds < 0:
                raise TimeUp
            found = [Trial(name, part[name], kld) for name, kld in self.probe(part).items()]
            self.results += found
            self._take_best(found)
        return self._best is not before

    def add_all(self, proposals: Iterator[tuple[str, IntArray]]) -> None:
        """Measure a pass's worth at a time; making proposals, too, takes of the time.

        Raises:
            TimeUp: when no time is left; what was proposed by then is not measured any more.
        """
        part: dict[str, IntArray] = {}
        for name, choice in proposals:
            part[name] = choice
            if self.left_seconds < 0:
                raise TimeUp
            if len(part) == self.measuring.pass_plans:
                self.add(part)
                part = {}
        self.add(part)

    def probe(self, choices: Mapping[str, IntArray]) -> Mapping[str, FloatArray]:
        """Measure one pass's worth, whether it fits or not; none of it can become the best.

        Raises:
            TimeUp: the time ran out before the last layer.
            MeasuringFailed: the machine is not able to measure.
        """
        known = self._measured_before()
        new = {name: choice for name, choice in choices.items() if _key(choice) not in known}
        found: Mapping[str, FloatArray] = {}
        if new:
            start = time.monotonic()
            found = self._measure(new, self._check_time)
            self.seconds_per_plan = (time.monotonic() - start) / len(new)
        return {
            name: found[name] if name in new else known[_key(choice)]
            for name, choice in choices.items()
        }

    def passes(self, choices: Mapping[str, IntArray]) -> Iterator[dict[str, IntArray]]:
        """`choices`, as many at a time as are measured together."""
        names = list(choices)
        for start in range(0, len(names), self.measuring.pass_plans):
            yield {name: choices[name] for name in names[start : start + self.measuring.pass_plans]}

    def _measured_before(self) -> dict[bytes, FloatArray]:
        return {_key(trial.choice): trial.token_kld for trial in self.results}

    def _take_best(self, found: Sequence[Trial]) -> None:
        """Let the surest of `found` take the best one's place, if it is sure enough."""
        if self._best is None:
            self._best, *found = found
        while (better := surest(self._best, found)) is not self._best:
            self._best = better

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
