"""Does something pay on this machine? Blocks of tokens with and without it, by turns."""

from __future__ import annotations

import statistics
import time

BLOCK_TOKENS = 8
BLOCKS = 5
"""Of each kind; then the faster kind stays."""
LEAST_GAIN = 0.02
"""What is tried has to win by so much of a token's time."""


class InterleavedTrial:
    """Says for every token whether to do what is tried."""

    def __init__(self) -> None:
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._num_tokens = 0
        self._start: float | None = None
        self.verdict: bool | None = None
        """None while it is being tried."""

    def start_token(self) -> bool:
        """A token is about to be computed: whether it is done for this one."""
        self._start = time.perf_counter()
        return self.is_on

    def end_token(self) -> None:
        """The token is there."""
        if self.verdict is not None or self._start is None:
            return
        is_first = self._num_tokens % BLOCK_TOKENS == 0  # what it finds, the other kind left
        if not is_first:
            self._seconds[self.is_on].append(time.perf_counter() - self._start)
        self._num_tokens += 1
        if self._num_tokens == 2 * BLOCKS * BLOCK_TOKENS:
            self.verdict = self.gain > LEAST_GAIN

    @property
    def gain(self) -> float:
        """Share of a token's time that it saves, by medians; 0 before it was tried."""
        if not all(self._seconds.values()):
            return 0.0
        on, off = (statistics.median(self._seconds[kind]) for kind in (True, False))
        return 1 - on / off

    @property
    def is_on(self) -> bool:
        """Whether it is done for the token at hand."""
        if self.verdict is not None:
            return self.verdict
        return self._num_tokens // BLOCK_TOKENS % 2 == 0
