"""`Guesses`: which misses were guessed, and how many came true; `JudgedGuesses` learn from it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from edge_moe.runtime.policy import AdmissionRule, PagingStatistics


class Guesses:
    """Of one engine; belongs to the thread that decodes."""

    def __init__(self) -> None:
        self._misses: dict[int, set[int]] = {}

    def remember(self, layer: int, misses: Iterable[int]) -> None:
        """Router rows that `layer` will ask for, as is guessed, and that are not in memory."""
        self._misses[layer] = set(misses)

    def score(self, layer: int, rows: Sequence[int], statistics: PagingStatistics) -> set[int]:
        """The router of `layer` chose `rows`; what was guessed for it."""
        guessed = self._misses.pop(layer, set())
        statistics.predicted_misses += len(guessed)
        statistics.predicted_misses_used += len(guessed & set(rows))
        return guessed


class JudgedGuesses(Guesses):
    """What becomes of guesses teaches a rule which to read."""

    def __init__(self) -> None:
        super().__init__()
        self.rule = AdmissionRule()
        self._last = (time.perf_counter(), 0.0)

    def score(self, layer: int, rows: Sequence[int], statistics: PagingStatistics) -> set[int]:
        guessed = super().score(layer, rows, statistics)
        for row in guessed:
            self.rule.learn_precision(layer, row in rows)
        now, stalled = time.perf_counter(), statistics.stall_seconds
        before, stalled_before = self._last
        self.rule.learn_busy(stalled - stalled_before, now - before)
        self._last = now, stalled
        return guessed
