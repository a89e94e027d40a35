"""Lagrangian relaxation: put a price on a byte, and every layer can be solved alone and exactly.

At price p the choice that minimises loss + p * bytes is the optimum for the bytes it happens to
take, so sweeping p yields exact points of the quality-against-size frontier. For any budget B,
min(loss + p * bytes) - p * B is a lower bound of the least loss that fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edge_moe.problem import FloatArray, IntArray, Problem, keep_cheapest

_MAX_BISECTIONS = 100


@dataclass(frozen=True, eq=False)
class PricedChoice:
    """The optimum at one price, which is also the optimum for `expert_bytes`."""

    price: float
    """Loss per byte."""
    choice: IntArray
    """[L, E]"""
    loss: float
    expert_bytes: int

    def bound(self, budget_bytes: int) -> float:
        """No choice within `budget_bytes` has a smaller loss than this."""
        return self.loss + self.price * (self.expert_bytes - budget_bytes)


def choose_at_price(problem: Problem, price: float) -> PricedChoice:
    """Minimise loss + `price` * bytes under every rule of `problem` but its budget.

    Needs scope `expert`. Ties go to fewer bytes, then to the lower expert id.
    """
    cost = problem.loss + price * problem.form_bytes
    kept_cost = np.where(problem.allowed[..., 1:], cost[..., 1:], np.inf)
    kept_form = kept_cost.argmin(axis=-1) + 1
    regret = kept_cost.min(axis=-1) - cost[..., 0]  # of keeping the expert; +inf: cannot be kept
    count = _best_counts(problem, regret)
    choice = keep_cheapest(problem, kept_form, regret, count)
    return PricedChoice(price, choice, problem.loss_of(choice), problem.bytes_of(choice))


def _best_counts(problem: Problem, regret: FloatArray) -> IntArray:
    """[L] how many experts each group of a layer keeps at least cost.

    Sorted regrets are summed; forced experts count 0, as they are the same in every candidate.
    """
    free = ~problem.must_keep & problem.can_keep
    order = np.where(problem.must_keep, -np.inf, np.where(problem.can_keep, regret, np.inf))
    rank = np.argsort(problem.by_group(order), axis=-1, kind="stable")
    regrets = np.take_along_axis(problem.by_group(np.where(free, regret, 0.0)), rank, axis=-1)
    totals = np.cumsum(regrets.sum(axis=1), axis=-1)  # [L, E / G], entry n - 1 for count n
    totals = np.concatenate([np.zeros((problem.num_layers, 1)), totals], axis=-1)
    least, most = problem.group_bounds
    counts = np.arange(problem.group_size + 1)
    totals[(counts < least[:, None]) | (counts > most[:, None])] = np.inf
    best: IntArray = totals.argmin(axis=-1)
    return best


def cheapest_price(problem: Problem, budget_bytes: int) -> PricedChoice:
    """The choice at the lowest price whose bytes stay within `budget_bytes`.

    `budget_bytes` must be at least `smallest_bytes(problem)`.
    """
    free = choose_at_price(problem, 0.0)
    if free.expert_bytes <= budget_bytes:
        return free
    ceiling = float(problem.loss.max(axis=-1).sum())  # one byte then outweighs all loss there is
    best = choose_at_price(problem, ceiling)
    low, high = ceiling * 1e-24, ceiling
    for _ in range(_MAX_BISECTIONS):
        middle = math.sqrt(low * high)
        tried = choose_at_price(problem, middle)
        if tried.expert_bytes <= budget_bytes:
            high, best = middle, tried
        else:
            low = middle
        if high / low < 1 + 1e-9:
            break
    return best
