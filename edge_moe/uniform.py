"""Exact plans for targets where every layer keeps the same number of experts in a shared form.

For a count n per group and a form t of layer l, the best experts to keep are those with the largest
gain drop_loss - loss_t, so cost[l, t] is one sort. What remains is one form per layer under a byte
limit: a dynamic program over bytes in units of their greatest common divisor. All byte limits are
answered by one table, so a whole frontier costs as much as one plan.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from edge_moe.problem import FloatArray, IntArray, Problem, Solution, keep_cheapest

_ROUNDING = 1e-12  # relative differences below this are float64 noise


class UniformFrontier:
    """Least loss at every expert budget, for scope `layer` or `model`."""

    def __init__(self, problem: Problem) -> None:
        if problem.scope == "expert":
            raise ValueError("scope `expert` has no uniform count")
        self._problem = problem
        self._unit = int(np.gcd.reduce(problem.form_bytes))
        least, most = problem.group_bounds
        self._counts = range(int(least.max()), int(most.min()) + 1)

    def best(self, budget_bytes: int) -> Solution:
        """The least loss within `budget_bytes`; among equals, the fewest experts, then bytes.

        Raises:
            ValueError: nothing fits; see `edge_moe.problem.smallest_bytes`.
        """
        best_loss, best_count = np.inf, None
        for count, table in self._tables.items():
            room = self._room(count, budget_bytes, len(table))
            if room >= 0 and table[room] < best_loss * (1 - _ROUNDING):
                best_loss, best_count = float(table[room]), count
        if best_count is None:
            raise ValueError(f"no uniform choice fits into {budget_bytes} expert bytes")
        return Solution.of(self._problem, self._choice(best_count, budget_bytes))

    def _room(self, count: int, budget_bytes: int, table_size: int) -> int:
        """Budget as an index of the table of `count`, which counts units per kept expert."""
        kept_per_layer = count * self._problem.num_groups
        return min(budget_bytes // (self._unit * kept_per_layer), table_size - 1)

    @cached_property
    def _units(self) -> IntArray:
        """[F - 1] bytes of the kept forms, in units; over all layers for scope `model`."""
        units = self._problem.form_bytes[1:] // self._unit
        return units * self._problem.num_layers if self._problem.scope == "model" else units

    @cached_property
    def _costs(self) -> FloatArray:
        """[E / G + 1, rows, F - 1] loss of the best kept sets; a row is a layer or the model."""
        problem = self._problem
        gains = np.where(problem.allowed, problem.loss[..., :1] - problem.loss, -np.inf)[..., 1:]
        forced = np.where(problem.must_keep[..., None] & np.isfinite(gains), np.inf, gains)
        order = np.argsort(-problem.by_group(forced), axis=2, kind="stable")
        sorted_gains = np.take_along_axis(problem.by_group(gains), order, axis=2)
        total_gains = np.cumsum(sorted_gains, axis=2).sum(axis=1)  # [L, E / G, F - 1]
        zeros = np.zeros_like(total_gains[:, :1])
        all_dropped = problem.loss[..., 0].sum(axis=1)[:, None, None]
        costs = all_dropped - np.concatenate([zeros, total_gains], axis=1)
        costs = np.where(
            costs < _ROUNDING * all_dropped, 0.0, costs
        )  # what cancellation leaves of a zero
        barred = problem.must_keep[..., None] & ~problem.allowed[..., 1:]  # [L, E, F - 1]
        costs = np.where(barred.any(axis=1, keepdims=True), np.inf, costs)
        if problem.scope == "model":
            costs = costs.sum(axis=0, keepdims=True)
        return np.moveaxis(costs, 1, 0)

    @cached_property
    def _tables(self) -> dict[int, FloatArray]:
        return {count: self._fill(count)[0] for count in self._counts}

    def _fill(self, count: int) -> tuple[FloatArray, IntArray]:
        """(least loss within c units, for every c; [rows, c] form taken for each row).

        Rows are added one by one; a form is replaced only by one that loses strictly less, in
        ascending order of bytes, so ties go to fewer bytes.
        """
        costs = self._costs[count]
        size = len(costs) * int(self._units.max()) + 1
        least = np.zeros(size)
        forms = np.zeros((len(costs), size), np.int64)
        for row, row_costs in enumerate(costs):
            previous, least = least, np.full(size, np.inf)
            for form, (units, cost) in enumerate(zip(self._units, row_costs, strict=True)):
                candidate = np.full(size, np.inf)
                candidate[units:] = previous[: size - units] + cost
                better = candidate < least
                least[better] = candidate[better]
                forms[row, better] = form
        return least, forms

    def _choice(self, count: int, budget_bytes: int) -> IntArray:
        """[L, E] walk the table of `count` back from the smallest room with the same loss."""
        problem = self._problem
        least, forms = self._fill(count)
        room = self._room(count, budget_bytes, len(least))
        room = int(np.argmax(least[: room + 1] <= least[room] * (1 + _ROUNDING)))
        row_forms = np.zeros(len(forms), np.int64)
        for row in reversed(range(len(forms))):
            row_forms[row] = forms[row, room]
            room -= int(self._units[row_forms[row]])
        layer_forms = np.broadcast_to(row_forms, problem.num_layers) + 1
        return self._keep_best(layer_forms, count)

    def _keep_best(self, layer_forms: IntArray, count: int) -> IntArray:
        """[L, E] the `count` best experts of each group, in their layer's form."""
        problem = self._problem
        index = layer_forms[:, None, None]
        in_form = np.take_along_axis(problem.allowed, index, axis=-1)[..., 0]
        loss = np.take_along_axis(problem.loss, index, axis=-1)[..., 0]
        price = np.where(in_form, loss - problem.loss[..., 0], np.inf)
        kept_form = np.broadcast_to(layer_forms[:, None], in_form.shape)
        return keep_cheapest(problem, kept_form, price, np.full(problem.num_layers, count))
