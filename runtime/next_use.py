"""The default order of eviction: what will most likely be needed last goes first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from edge_moe.runtime.policy import EvictionPolicy, Key

_LEAST = 1e-9
"""No share counts as less."""
_UNSEEN = 1e-3
"""Share of an expert that was never used: less than one use in a few hundred visits gives."""
_ABSENT = -np.inf
"""Gap of an expert that is not resident."""
_ROWS_AT_ONCE = 16
"""Rows come by so many, so that arrays are seldom copied."""
_BYTES_PER_PAIR = 4
_BYTES_PER_ROW = 8 + 8 + 8 + 1
"""Two float64 of expectation, one share, and whether it is resident."""
_BYTES_PER_PAIR_OF_LAYERS = 8
_BYTES_PER_LAYER = 8 + 8

_Shares = npt.NDArray[np.floating]


class _Visits:
    """One layer's last visits, and what it chose at those that followed a choice of an expert."""

    def __init__(self, num_rows: int) -> None:
        self.chosen: list[int] = []
        """At the visit that is going on, or was last."""
        self._before: list[int] = []
        self._after = np.zeros((num_rows, num_rows), np.float32)
        """[E, E] by i: share of the visits right after one that chose i."""
        self._known: set[int] = set()
        """Those i for which there was one; else what is known of all visits stands for it."""

    def begin(self, shares: _Shares, decay: float) -> None:
        """Another visit; `shares` [E] are those of all visits so far."""
        before = self._before
        if before:
            self._after[[row for row in before if row not in self._known]] = shares
            after = self._after[before]
            after *= decay
            after[:, self.chosen] += 1 - decay
            self._after[before] = after
            self._known.update(before)
        self._before, self.chosen = self.chosen, []

    def is_new(self, rows: Sequence[int]) -> bool:
        """Whether the visit that is going on has chosen none of `rows` yet."""
        return not any(row in self.chosen for row in rows)

    def shares(self, known: _Shares) -> _Shares:
        """[E] what to expect of the next visit; `known` [E] are the shares of all visits."""
        chosen = self.chosen
        if not chosen:
            return known
        seen = [row for row in chosen if row in self._known]
        expected: _Shares = known + self._after[seen].sum(axis=0) / len(chosen)
        expected += known * ((len(chosen) - len(seen)) / len(chosen))
        expected /= 2
        return expected

    def grown(self, num_rows: int) -> _Visits:
        """The same of a layer of `num_rows` experts, which are more."""
        old, found = len(self._after), _Visits(num_rows)
        found._after.fill(_UNSEEN)
        found._after[:old, :old] = self._after
        found.chosen, found._before, found._known = self.chosen, self._before, self._known
        return found


class SoonestNextUse(EvictionPolicy):
    """Evicts what will most likely be needed last: Belady's rule on expected times of use.

    Layers take turns, and a layer asks for an expert with some probability p. Seen from layer l, an
    expert of layer m is next needed after (m - l) mod L layers, L for m = l, and then every L / p
    layers: (m - l) mod L + (1 / p - 1) L. p is the mean of two shares of the layer's visits: of all
    of them, and of those right after one that chose what the last one chose. Both are exponential
    means, for text changes. Counts of uses alone forget nothing, the time since the last use alone
    knows one visit; neither knows which layer comes next. A choice takes time linear in the layers,
    and in the experts of those that were used since the last one. 4 E^2 bytes per layer.
    """

    name = "next-use"
    decay = 0.96
    """Per visit. On the demo model .95 to .98 are within a point of each other while a task lasts;
    the slower ones follow a change of task too late."""

    def __init__(self) -> None:
        self._shares = np.full((0, 0), _UNSEEN)
        """[L, E] share of each layer's visits that asked for the expert."""
        self._visits: list[_Visits] = []
        """[L]"""
        self._is_resident = np.zeros((0, 0), np.bool_)
        self._expected = np.zeros((0, 0))
        """[L, E] (1 / p - 1) L; right outside `_used` layers."""
        self._gaps = np.full((0, 0), _ABSENT)
        """[L, E] the same of residents; right outside `_stale` layers."""
        self._last_rows = np.zeros(0, np.int64)
        """[L] the resident with the largest gap."""
        self._last_gaps = np.zeros(0)
        self._used: set[int] = set()
        self._stale: set[int] = set()
        self._ahead = np.zeros((0, 0), np.int64)
        """[L, L] after how many layers another one is asked, seen from each."""
        self._layer = -1

    @classmethod
    def order_bytes(cls, num_layers: int, num_rows: int) -> int:
        rows = -(-num_rows // _ROWS_AT_ONCE) * _ROWS_AT_ONCE
        per_layer = rows * (_BYTES_PER_PAIR * rows + _BYTES_PER_ROW) + _BYTES_PER_LAYER
        return num_layers * (per_layer + _BYTES_PER_PAIR_OF_LAYERS * num_layers)

    def admit(self, key: Key) -> None:
        self._reach(key)
        layer, row = key
        self._is_resident[key] = True
        if layer in self._stale or layer in self._used:
            return
        self._gaps[key] = gap = self._expected[key]
        if gap > self._last_gaps[layer]:
            self._last_gaps[layer], self._last_rows[layer] = gap, row

    def use(self, key: Key) -> None:
        self.use_all(key[0], [key[1]])

    def use_all(self, layer: int, rows: Sequence[int]) -> None:
        visits, shares = self._visits[layer], self._shares[layer]
        # a layer's uses come together; with a single layer a repeated row tells two visits apart
        if layer != self._layer or not visits.is_new(rows):
            self._layer = layer
            visits.begin(shares, self.decay)
            shares *= self.decay
        visits.chosen.extend(rows)
        shares[rows] += 1 - self.decay
        self._used.add(layer)
        self._stale.add(layer)

    def forget(self, key: Key) -> None:
        layer, row = key
        if not self._is_resident[key]:
            raise KeyError(key)
        was_stale = layer in self._stale
        self._stale.add(layer)  # until all of it is done: Ctrl-C may come at any line
        self._is_resident[key] = False
        self._gaps[key] = _ABSENT
        if self._last_rows[layer] == row:
            self._find_last(layer)
        if not was_stale:
            self._stale.remove(layer)

    def victim(self, may_evict: Callable[[Key], bool]) -> Key | None:
        self._settle()
        num_layers = len(self._gaps)
        if not num_layers:
            return None
        ahead = self._ahead[self._layer]
        expected, rows = ahead + self._last_gaps, self._last_rows
        refused: dict[int, npt.NDArray[np.float64]] = {}
        while True:
            layer = int(expected.argmax())
            if expected[layer] == _ABSENT:
                return None
            row = int(rows[layer])
            if may_evict((layer, row)):
                return layer, row
            rows = rows.copy() if not refused else rows
            gaps = refused.setdefault(layer, self._gaps[layer].copy())
            gaps[row] = _ABSENT
            rows[layer] = gaps.argmax()
            expected[layer] = ahead[layer] + gaps.max()

    def _settle(self) -> None:
        """Bring the gaps up to date."""
        for layer in self._used:
            shares = np.maximum(self._visits[layer].shares(self._shares[layer]), _LEAST)
            self._expected[layer] = (1 / np.minimum(shares, 1) - 1) * len(self._gaps)
        self._used.clear()
        for layer in self._stale:
            self._gaps[layer] = np.where(self._is_resident[layer], self._expected[layer], _ABSENT)
            self._find_last(layer)
        self._stale.clear()

    def _find_last(self, layer: int) -> None:
        gaps = self._gaps[layer]
        self._last_rows[layer] = row = gaps.argmax()
        self._last_gaps[layer] = gaps[row]

    def _reach(self, key: Key) -> None:
        """Make the arrays large enough for `key`."""
        layers, rows = self._shares.shape
        if key[0] < layers and key[1] < rows:
            return
        num_rows = -(-(key[1] + 1) // _ROWS_AT_ONCE) * _ROWS_AT_ONCE
        shape = max(layers, key[0] + 1), max(rows, num_rows)
        shares, is_resident = np.full(shape, _UNSEEN), np.zeros(shape, np.bool_)
        shares[:layers, :rows], is_resident[:layers, :rows] = self._shares, self._is_resident
        every = np.arange(shape[0])
        visits = [each.grown(shape[1]) for each in self._visits]
        visits += [_Visits(shape[1]) for _ in range(shape[0] - layers)]
        larger = {
            "_shares": shares,
            "_is_resident": is_resident,
            "_expected": np.zeros(shape),
            "_gaps": np.full(shape, _ABSENT),
            "_last_rows": np.zeros(shape[0], np.int64),
            "_last_gaps": np.full(shape[0], _ABSENT),
            "_used": set(range(shape[0])),
            "_stale": set(range(shape[0])),
            "_ahead": shape[0] - (every[:, None] - every) % shape[0],
            "_visits": visits,
        }
        vars(self).update(larger)  # at once: Ctrl-C may come at any line
