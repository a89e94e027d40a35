"""Averaging experts: alignment of hidden units, weighted means, and router rows of a merged group.

The hidden units of an expert may be reordered without changing what it computes, so unit j of one
expert corresponds to unit p(j) of another, found by the Hungarian algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from edge_moe.converters.transforms.base import FloatArray, LayerResult, LayerWeights, Setting
from edge_moe.spec import ModelSpec

Cost = Callable[[int, int], FloatArray]
"""(reference expert, other expert) -> [I, I] cost of matching unit row with unit column."""

ROUTER_SETTING = Setting(
    "dominant",
    "router row of a merged expert: that of its dominant member, or the weighted mean",
    words=("dominant", "mean"),
)


def hidden_units(weights: LayerWeights, expert_id: int) -> Tensor:
    """[I, 3H] (gate row, up row, down column) of every hidden unit."""
    gate, up = weights.gate_up[expert_id].chunk(2)
    return torch.cat([gate, up, weights.down[expert_id].T], dim=1)


def set_hidden_units(weights: LayerWeights, expert_id: int, units: Tensor) -> None:
    """Write [I, 3H] units into expert `expert_id`; inverse of `hidden_units`."""
    gate, up, down = units.chunk(3, dim=1)
    weights.gate_up[expert_id] = torch.cat([gate, up])
    weights.down[expert_id] = down.T


def weight_cost(weights: LayerWeights) -> Cost:
    """Minus the inner products of the units: weight matching, as in Git Re-Basin (2209.04836)."""

    def cost(reference: int, other: int) -> FloatArray:
        left, right = (hidden_units(weights, each).double() for each in (reference, other))
        found: FloatArray = -(left @ right.T).numpy()
        return found

    return cost


def aligned_units(weights: LayerWeights, reference: int, other: int, cost: Cost) -> Tensor:
    """[I, 3H] units of `other`, in the order that matches those of `reference` best."""
    _, columns = linear_sum_assignment(cost(reference, other))
    return hidden_units(weights, other)[torch.from_numpy(columns)]


def merge_groups(
    weights: LayerWeights,
    members: Sequence[Sequence[int]],
    importance: FloatArray,
    cost: Cost | None,
    router: str = "dominant",
) -> LayerResult:
    """One expert per group: the mean of its members, weighted by `importance` [E].

    The first member is dominant: the others are aligned to it (not at all when `cost` is None).
    A group of one is copied bit for bit. The router can give a group one row only, since each
    output expert has one: with `dominant` the first member's, with `mean` the weighted mean.
    """
    result = weights.select([group[0] for group in members])
    for new_id, group in enumerate(members):
        if len(group) == 1:
            continue
        shares = group_shares(importance, group)
        units = torch.zeros_like(hidden_units(weights, group[0]), dtype=torch.float64)
        for share, expert_id in zip(shares, group, strict=True):
            if cost is None or expert_id == group[0]:
                units += share * hidden_units(weights, expert_id).double()
            else:
                units += share * aligned_units(weights, group[0], expert_id, cost).double()
        set_hidden_units(result, new_id, units.float())
        if router == "mean":
            _average_router_rows(weights, result, new_id, group, shares)
    return LayerResult(result, [list(group) for group in members])


def align_groups(weights: LayerWeights, members: Sequence[Sequence[int]]) -> LayerWeights:
    """A copy whose experts compute the same, with hidden units in their dominant member's order."""
    result = weights.select(range(weights.num_experts))
    cost = weight_cost(weights)
    for group in members:
        for expert_id in group[1:]:
            set_hidden_units(result, expert_id, aligned_units(weights, group[0], expert_id, cost))
    return result


def group_shares(importance: FloatArray, group: Sequence[int]) -> list[float]:
    """Shares of the members, summing to 1; equal where none has any importance."""
    values = importance[list(group)]
    total = values.sum()
    shares = values / total if total > 0 else np.full(len(group), 1 / len(group))
    return [float(share) for share in shares]


def _average_router_rows(
    weights: LayerWeights,
    result: LayerWeights,
    new_id: int,
    group: Sequence[int],
    shares: Sequence[float],
) -> None:
    for name, rows in weights.router.items():
        mean = sum(share * rows[i].double() for share, i in zip(shares, group, strict=True))
        result.router[name][new_id] = torch.as_tensor(mean).float()


def merge_bytes(spec: ModelSpec) -> int:
    """Scratch memory of aligning and averaging: a few experts in float64 and one cost matrix."""
    return 8 * (6 * spec.expert_weights + 4 * spec.expert_width**2)
