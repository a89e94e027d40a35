"""DERN (arXiv 2509.10377): drop experts, and give their hidden units to the experts that stay.

1. An expert's importance is the mean over tokens of its gate where it was chosen, else 0. The N
   most important stay.
2. A segment is one hidden unit: gate row, up row and down column. Every segment of a dropped expert
   goes to the kept expert that owns the most similar segment, if that cosine exceeds `threshold`;
   else it is lost. (up c, down / c) computes the same for every c, so both are scaled to equal
   length first; the gate row takes no part, which the paper's ablation found slightly better.
3. Each kept expert clusters its own and the received segments back to I by spherical k-means,
   weighted by the importance of the expert a segment came from, starting from the segments with
   the largest |element| in the gate row. A cluster's members are scaled to their mean length and
   averaged.

An expert that receives nothing is left alone. Router rows of dropped experts go, the others stay.
The paper also adds importance / I per segment to the receiver's importance, which nothing uses
after that. Super experts receive nothing. Cost: 6 H (own + received) I per round and expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from edge_moe.converters.transforms.base import (
    LayerResult,
    LayerTask,
    LayerWeights,
    Setting,
    register,
)
from edge_moe.converters.transforms.merging import hidden_units, set_hidden_units
from edge_moe.converters.transforms.selection import kept_by_score, receivers
from edge_moe.spec import ModelSpec

_MAX_ROUNDS = 50
_LEAST_WEIGHT = 1e-12  # of the largest: a cluster of segments that nothing chose has a mean, too


@dataclass(frozen=True)
class Received:
    """Segments that one kept expert was given."""

    units: Tensor
    """[R, 3H]"""
    weights: Tensor
    """[R] importance of the experts they came from."""


@register(
    "dern",
    "drop experts, cluster their hidden units into those of the experts that stay",
    "arXiv 2509.10377",
    settings={"threshold": Setting(0.6, "cosine above which a hidden unit is kept", -1, 1)},
    scratch_bytes=lambda spec, num_tokens: _scratch_bytes(spec),
)
def dern(task: LayerTask) -> LayerResult:
    """The kept experts, enriched, in their old order."""
    importance = torch.from_numpy(task.score("weighted-frequency"))
    kept = kept_by_score(task, importance.numpy())
    result = task.weights.select(kept)
    given = _give(task, kept, importance)
    for new_id, expert_id in enumerate(kept):
        if expert_id in given:
            own = hidden_units(task.weights, expert_id)
            merged = recombine(own, float(importance[expert_id]), given[expert_id])
            set_hidden_units(result, new_id, merged)
    num_given = sum(len(each.weights) for each in given.values())
    num_dropped = (task.weights.num_experts - len(kept)) * task.weights.expert_width
    facts = {"share_of_units_kept": num_given / num_dropped if num_dropped else 0.0}
    return LayerResult(result, [[expert_id] for expert_id in kept], facts)


def _give(task: LayerTask, kept: list[int], importance: Tensor) -> dict[int, Received]:
    """What every kept expert receives; experts that get nothing are absent."""
    allowed = receivers(task, kept)
    parts: dict[int, list[Received]] = {}
    for dropped in range(task.weights.num_experts):
        if dropped in kept:
            continue
        candidates = [i for i in kept if allowed[dropped, i]]
        owner = assign(task.weights, dropped, candidates, task.number("threshold"))
        units = hidden_units(task.weights, dropped)
        for expert_id in candidates:
            mine = owner == expert_id
            if mine.any():
                weights = importance[dropped].expand(int(mine.sum()))
                parts.setdefault(expert_id, []).append(Received(units[mine], weights))
    return {
        expert_id: Received(
            torch.cat([each.units for each in found]), torch.cat([each.weights for each in found])
        )
        for expert_id, found in parts.items()
    }


def assign(weights: LayerWeights, dropped: int, candidates: list[int], threshold: float) -> Tensor:
    """[I] the expert that receives each segment of `dropped`, or -1 below the threshold."""
    segments = _directions(hidden_units(weights, dropped))
    best = torch.full((len(segments),), threshold)
    owner = torch.full((len(segments),), -1)
    for expert_id in candidates:
        cosines = (segments @ _directions(hidden_units(weights, expert_id)).T).amax(dim=1)
        owner = torch.where(cosines > best, expert_id, owner)
        best = torch.maximum(best, cosines)
    return owner


def _directions(units: Tensor) -> Tensor:
    """[n, 3H] -> [n, 2H] (up row, down column), scaled to equal lengths and to 1 together."""
    _, up, down = units.chunk(3, dim=1)
    return normalize(torch.cat([normalize(up, dim=1), normalize(down, dim=1)], dim=1), dim=1)


def recombine(own: Tensor, importance: float, received: Received) -> Tensor:
    """[I, 3H] own segments and the received ones, clustered to I."""
    units = torch.cat([own, received.units])
    weights = torch.cat(
        [torch.full((len(own),), importance, dtype=torch.float64), received.weights]
    )
    if not bool(weights.sum() > 0):
        weights = torch.ones_like(weights)
    weights = weights.clamp_min(float(weights.max()) * _LEAST_WEIGHT)
    labels = _spherical_kmeans(normalize(units, dim=1), weights, _first_centres(units, len(own)))
    sums = _weighted_sums(normalize(units, dim=1), weights, labels, len(own))
    lengths = _weighted_sums(units.norm(dim=1, keepdim=True), weights, labels, len(own))
    totals = torch.zeros(len(own), dtype=torch.float64).index_add_(0, labels, weights)[:, None]
    merged = (sums / totals) * (lengths / totals)
    alone = torch.bincount(labels, minlength=len(own)) == 1
    first = torch.zeros(len(own), dtype=torch.long).scatter_(0, labels, torch.arange(len(labels)))
    return torch.where(alone[:, None], units[first], merged.float())


def _first_centres(units: Tensor, num_clusters: int) -> Tensor:
    """Indices of the segments with the largest |element| in the gate row, ascending."""
    gate = units.chunk(3, dim=1)[0].abs().amax(dim=1)
    order = torch.argsort(gate, descending=True, stable=True)
    return order[:num_clusters].sort().values


def _spherical_kmeans(directions: Tensor, weights: Tensor, first: Tensor) -> Tensor:
    """[n] labels. A cluster that lost all members gets the segment that fits its own least."""
    centres = directions[first]
    labels = torch.full((len(directions),), -1)
    for _ in range(_MAX_ROUNDS):
        cosines = directions @ centres.T
        best, new = cosines.max(dim=1)
        counts = torch.bincount(new, minlength=len(first))
        for cluster in (counts == 0).nonzero()[:, 0].tolist():
            movable = torch.where(counts[new] > 1, best, torch.inf)
            worst = int(movable.argmin())
            counts[new[worst]] -= 1
            counts[cluster] += 1
            new[worst], best[worst] = cluster, torch.inf
        if bool((new == labels).all()):
            break
        labels = new
        sums = _weighted_sums(directions, weights, labels, len(first))
        centres = normalize(sums, dim=1).float()
    return labels


def _weighted_sums(values: Tensor, weights: Tensor, labels: Tensor, num_clusters: int) -> Tensor:
    """[clusters, width] float64 sums of weight x value over the members."""
    sums = torch.zeros(num_clusters, values.shape[1], dtype=torch.float64)
    return sums.index_add_(0, labels, weights[:, None] * values.double())


def _scratch_bytes(spec: ModelSpec) -> int:
    """Received segments of a layer, those of one expert clustered in float64, and cosines."""
    segment = 3 * spec.hidden_size
    most = spec.num_experts * spec.expert_width
    return 4 * most * segment + 24 * most * segment + 8 * most * spec.expert_width
