"""Does something pay on this machine? Blocks of tokens with and without it, by turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

BLOCK_TOKENS = 8
BLOCKS = 5
"""Of each of two kinds; then the faster kind stays."""
_FEWEST_BLOCKS = 3
"""Of each of many kinds."""
LEAST_GAIN = 0.02
"""What is tried has to win by so much of a token's time."""


class FastestOf:
    """Says for every token which of several things to do, or none of them."""

    def __init__(self, names: Sequence[str]) -> None:
        """`names` of what is tried, beside doing nothing."""
        self._kinds: list[str | None] = [*names, None]
        self._seconds: dict[str | None, list[float]] = {kind: [] for kind in self._kinds}
        rounds = max(_FEWEST_BLOCKS, 2 * BLOCKS // len(self._kinds))
        self._most_tokens = rounds * len(self._kinds) * BLOCK_TOKENS
        self._num_tokens = 0
        self._start: float | None = None
        self.best: str | None = None
        """Once it is over: what is done from then on; None where nothing pays."""

    @property
    def is_over(self) -> bool:
        """Whether `best` stays."""
        return self._num_tokens == self._most_tokens

    @property
    def now(self) -> str | None:
        """What is done for the token at hand."""
        if self.is_over:
            return self.best
        return self._kinds[self._num_tokens // BLOCK_TOKENS % len(self._kinds)]

    def start_token(self) -> str | None:
        """A token is about to be computed: what is done for this one."""
        self._start = time.perf_counter()
        return self.now

    def end_token(self) -> None:
        """The token is there."""
        if self.is_over or self._start is None:
            return
        is_first = self._num_tokens % BLOCK_TOKENS == 0  # what it finds, another kind left
        if not is_first:
            self._seconds[self.now].append(time.perf_counter() - self._start)
        self._num_tokens += 1
        if self.is_over:
            gain, name = max((gain, name) for name, gain in self.gains.items())
            self.best = name if gain > LEAST_GAIN else None

    @property
    def gains(self) -> dict[str, float]:
        """By name: share of a token's time that it saves, by medians; 0 before it was tried.

        Negative where it costs time.
        """
        return {name: self._gain(name) for name in self._kinds if name is not None}

    def _gain(self, name: str) -> float:
        on, off = self._seconds[name], self._seconds[None]
        return 1 - statistics.median(on) / statistics.median(off) if on and off else 0.0


class InterleavedTrial:
    """Says for every token whether to do the one thing that is tried."""

    def __init__(self) -> None:
        self._trial = FastestOf(["it"])

    @property
    def verdict(self) -> bool | None:
        """None while it is being tried."""
        return self._trial.best is not None if self._trial.is_over else None

    def start_token(self) -> bool:
        """A token is about to be computed: whether it is done for this one."""
        return self._trial.start_token() is not None

    def end_token(self) -> None:
        """The token is there."""
        self._trial.end_token()

    @property
    def gain(self) -> float:
        """Share of a token's time that it saves, by medians; 0 before it was tried."""
        return self._trial.gains["it"]

    @property
    def is_on(self) -> bool:
        """Whether it is done for the token at hand."""
        return self._trial.now is not None
