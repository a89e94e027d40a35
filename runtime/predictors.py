"""Guesses of the next layer's experts that need nothing but ids, so that a trace can score them.

The engines ask the next layer's router about the current hidden state (`runtime.prefetch`,
`runtime.llama_predict`), which no trace holds; these show what can be had without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from edge_moe.runtime.simulate import Ask


class Predictor(ABC):
    """Guesses while single tokens go through the layers in order."""

    name: str

    @abstractmethod
    def guess(self, layer: int, rows: Sequence[int]) -> list[int]:
        """Experts that layer `layer` + 1 may choose, now that `layer` has chosen `rows`."""

    @abstractmethod
    def learn(self, layer: int, rows: Sequence[int]) -> None:
        """`layer` has chosen `rows`. Comes before the guess that follows from them."""


class Popular(Predictor):
    """Those that the layer chose most often so far."""

    def __init__(self, num_rows: Sequence[int], width: int) -> None:
        self.name = f"popular {width}"
        self._width = width
        self._counts = [np.zeros(count, np.int64) for count in num_rows]

    def guess(self, layer: int, rows: Sequence[int]) -> list[int]:
        return _largest(self._counts[layer + 1], self._width)

    def learn(self, layer: int, rows: Sequence[int]) -> None:
        self._counts[layer][list(rows)] += 1


class Repeat(Predictor):
    """Those that the layer chose for the token before."""

    name = "last token's"

    def __init__(self, num_rows: Sequence[int]) -> None:
        self._last: list[list[int]] = [[] for _ in num_rows]

    def guess(self, layer: int, rows: Sequence[int]) -> list[int]:
        return list(self._last[layer + 1])

    def learn(self, layer: int, rows: Sequence[int]) -> None:
        self._last[layer] = list(rows)


class Transitions(Predictor):
    """Those that followed most often after the experts that this layer has chosen.

    Counts c[i, j] of "i here, j in the next layer"; j scores the sum over the chosen i of
    c[i, j] / c[i], the share of i's tokens that went on to j.
    """

    def __init__(self, num_rows: Sequence[int], width: int) -> None:
        self.name = f"transitions {width}"
        self._width = width
        pairs = zip(num_rows, num_rows[1:], strict=False)
        self._counts = [np.zeros(shape, np.int64) for shape in pairs]
        self._seen = [np.zeros(count, np.int64) for count in num_rows]
        self._before: tuple[int, list[int]] = (-1, [])

    def guess(self, layer: int, rows: Sequence[int]) -> list[int]:
        here = list(rows)
        seen = np.maximum(self._seen[layer][here], 1)[:, None]
        return _largest((self._counts[layer][here] / seen).sum(axis=0), self._width)

    def learn(self, layer: int, rows: Sequence[int]) -> None:
        before, chosen = self._before
        if layer and before == layer - 1:
            self._counts[before][np.ix_(chosen, list(rows))] += 1
            self._seen[before][chosen] += 1
        self._before = layer, list(rows)


class Exact(Predictor):
    """What will be chosen: a bound, and what a layer that routes by token id can have."""

    name = "exact"

    def __init__(self, asks: Iterable[Ask]) -> None:
        self._coming = [(ask.layer, ask.rows) for ask in asks if ask.is_decoding]
        self._time = 0

    def guess(self, layer: int, rows: Sequence[int]) -> list[int]:
        coming, chosen = self._coming[self._time]
        return list(chosen) if coming == layer + 1 else []

    def learn(self, layer: int, rows: Sequence[int]) -> None:
        self._time += 1


def predictor_makers(
    num_rows: Sequence[int], top_k: int, asks: Sequence[Ask]
) -> list[Callable[[], Predictor]]:
    """One of each, as wide as top_k and twice as wide, and the bound; each call starts afresh."""
    wide = min(2 * top_k, min(num_rows))
    return [
        lambda: Popular(num_rows, top_k),
        lambda: Popular(num_rows, wide),
        lambda: Repeat(num_rows),
        lambda: Transitions(num_rows, top_k),
        lambda: Transitions(num_rows, wide),
        lambda: Exact(asks),
    ]


def _largest(scores: np.ndarray, width: int) -> list[int]:
    """The `width` best with a score above zero, the first of equals."""
    order = np.argsort(-scores, kind="stable")[:width]
    found: list[int] = order[scores[order] > 0].tolist()
    return found
