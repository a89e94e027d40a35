"""Guesses of the next layer's experts that need nothing but ids, so that a trace can score them.

What asks the current hidden state (`runtime.state_guesses`) cannot be replayed, for no trace holds
states: a trace holds what was guessed, and `Replayed` says it again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

ROUTER_GUESSES = "router"
"""What the next layer's router says of the state that this layer's router was given."""
LINEAR_GUESSES = "linear"
"""What a map fitted at calibration makes of that state."""
PRIOR_LIMIT_BYTES = 64 * 2**20
"""Of `TokenPrior`'s table: 20,000 token ids of 48 layers with 8 experts noted for each."""


class Predictor(ABC):
    """Guesses while single tokens go through the layers in order."""

    name: str
    token_id: int | None = None
    """Of the token that goes through the layers; None where nobody says."""

    def begin(self, token_id: int | None) -> None:
        """A token is about to go through the layers."""
        self.token_id = token_id

    @abstractmethod
    def guess(self, layer: int, rows: Sequence[int]) -> list[int]:
        """Experts that layer `layer` + 1 may choose, now that `layer` has chosen `rows`."""

    @abstractmethod
    def learn(self, layer: int, rows: Sequence[int]) -> None:
        """`layer` has chosen `rows`. Comes before the guess that follows from them."""


_Ids = npt.NDArray[np.int32]


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


class TokenPrior(Predictor):
    """Those that the layer chose for this token id before (OpenMoE, Xue et al. 2024, section 4).

    `width` experts are noted for every token id and layer, each with a count, as Metwally et al.'s
    space-saving does: who is not noted takes the place of the rarest and its count, plus one. Token
    ids seen longest ago are forgotten when the table is full. Exact, from the second time on, for
    layers that route by token id alone.
    """

    def __init__(self, num_layers: int, width: int, limit_bytes: int = PRIOR_LIMIT_BYTES) -> None:
        self.name = f"token prior {width}"
        self._shape = num_layers, width
        self._most = max(1, limit_bytes // (num_layers * width * 8))
        self._tables: OrderedDict[int, tuple[_Ids, _Ids]] = OrderedDict()

    def begin(self, token_id: int | None) -> None:
        super().begin(token_id)
        if token_id is not None and token_id in self._tables:
            self._tables.move_to_end(token_id)

    def guess(self, layer: int, rows: Sequence[int]) -> list[int]:
        known = None if self.token_id is None else self._tables.get(self.token_id)
        if known is None:
            return []
        experts, counts = known[0][layer + 1], known[1][layer + 1]
        return [
            int(experts[place]) for place in np.argsort(-counts, kind="stable") if counts[place]
        ]

    def learn(self, layer: int, rows: Sequence[int]) -> None:
        if self.token_id is None:
            return
        experts, counts = (part[layer] for part in self._table(self.token_id))
        for row in rows:
            found = np.flatnonzero((experts == row) & (counts > 0))
            place = int(found[0]) if len(found) else int(counts.argmin())
            experts[place] = row
            counts[place] += 1

    @property
    def num_bytes(self) -> int:
        """Of the table."""
        return sum(each.nbytes for pair in self._tables.values() for each in pair)

    def _table(self, token_id: int) -> tuple[_Ids, _Ids]:
        """(experts, counts) of a token, [L, width] each."""
        if token_id not in self._tables:
            if len(self._tables) == self._most:
                self._tables.popitem(last=False)
            self._tables[token_id] = (
                np.zeros(self._shape, np.int32),
                np.zeros(self._shape, np.int32),
            )
        return self._tables[token_id]


class Replayed(Predictor):
    """What was written down: the guesses of an engine, or what was chosen in the end."""

    def __init__(self, name: str, coming: Iterable[tuple[int, Sequence[int]]]) -> None:
        """`coming` are (layer, rows guessed for it), one for every layer of every single token."""
        self.name = name
        self._coming = list(coming)
        self._time = 0

    def guess(self, layer: int, rows: Sequence[int]) -> list[int]:
        coming, guessed = self._coming[self._time]
        return list(guessed) if coming == layer + 1 else []

    def learn(self, layer: int, rows: Sequence[int]) -> None:
        self._time += 1


def _largest(scores: npt.NDArray[Any], width: int) -> list[int]:
    """The `width` best with a score above zero, the first of equals."""
    order = np.argsort(-scores, kind="stable")[:width]
    found: list[int] = order[scores[order] > 0].tolist()
    return found


def largest_logits(logits: npt.NDArray[np.float32], width: int) -> list[int]:
    """The `width` best of [E], best first."""
    count = min(width, len(logits))
    best = np.argpartition(-logits, count - 1)[:count]
    found: list[int] = best[np.argsort(-logits[best], kind="stable")].tolist()
    return found
