"""NAEE (arXiv 2402.14800): keep the N experts whose joint absence changes the layer's output least.

    loss(kept) = sum over windows of the Frobenius norm of (output with the kept experts - output)

where the router has chosen again among the kept ones and its weights follow as the model computes
them. For E <= 16 all drop sets are enumerated, as published; beyond, experts are dropped one at a
time, each time the one whose loss is least (greedy backward elimination, not in the paper).

With G = F F^T [E, E] the Gram matrix of a token's expert outputs F [E, H], and g, g' the old and
new weights, |change|**2 = g'.G.g' - 2 g'.G.g + g.G.g: after all experts have run once on every
token, a drop set costs k**2 numbers per token. Float64, as in the released code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, islice

import numpy as np
import torch
from torch import Tensor

from edge_moe.converters.transforms.base import (
    FloatArray,
    LayerResult,
    LayerSamples,
    LayerTask,
    all_outputs_bytes,
    register,
)
from edge_moe.converters.transforms.routing import SubsetRouter
from edge_moe.converters.transforms.selection import groups
from edge_moe.errors import InputError
from edge_moe.spec import ModelSpec

MAX_ENUMERATED_EXPERTS = 16
_SAMPLE_TOKENS = 4096  # 12870 sets of 8 of 16 then take 20 s per layer on one core
_BATCH_NUMBERS = 2**20  # tokens x sets x experts that are routed at a time


class OutputLoss:
    """Losses of sets of kept experts of one layer. Memory: 8 T E**2 bytes."""

    def __init__(self, samples: LayerSamples) -> None:
        self._samples = samples
        self._gram = _gram(samples)
        ids, gates = samples.expert_ids, samples.gates
        num_experts = samples.logits.shape[1]
        dense = torch.zeros(samples.num_tokens, num_experts, dtype=torch.float64)
        dense.scatter_(1, ids, gates)
        self._pull = torch.bmm(self._gram, dense[:, :, None])[:, :, 0]  # [T, E] G g
        self._square = (dense * self._pull).sum(dim=1)  # [T] g.G.g
        self._starts = np.cumsum((0, *samples.window_tokens[:-1]))

    def losses(self, kept_sets: Iterable[tuple[int, ...]], num_kept: int) -> FloatArray:
        """[sets] loss of every set of `num_kept` ascending expert ids."""
        router, step = self._router(num_kept)
        sets = iter(kept_sets)
        found = [
            self._batch(*router.route(torch.tensor(batch)))
            for batch in iter(lambda: list(islice(sets, step)), [])
        ]
        return np.concatenate(found)

    def losses_without(self, kept: Sequence[int], candidates: Sequence[int]) -> FloatArray:
        """[candidates] loss of the ascending ids `kept` without each of them in turn."""
        router, step = self._router(len(kept))
        found = []
        for gone in torch.split(torch.tensor(candidates), step):
            subsets = torch.tensor(kept).expand(len(gone), -1)
            found.append(self._batch(*router.route(subsets, gone)))
        return np.concatenate(found)

    def _router(self, num_kept: int) -> tuple[SubsetRouter, int]:
        """(the layer's router on `num_kept` experts, sets that it routes at a time)."""
        step = max(1, _BATCH_NUMBERS // (self._samples.num_tokens * num_kept))
        return SubsetRouter(self._samples.block.router, self._samples.logits, num_kept), step

    def _batch(self, ids: Tensor, weights: Tensor) -> FloatArray:
        """[B] losses from (ids, weights), [B, T, k] each."""
        num_experts = self._pull.shape[1]
        row = torch.arange(ids.shape[1])[None] * num_experts
        slots = [(ids[..., slot], weights[..., slot].double()) for slot in range(ids.shape[2])]
        change = self._square.expand(ids.shape[:2]).clone()
        for i, (left, left_weight) in enumerate(slots):
            place = row + left
            change -= 2 * left_weight * self._pull.take(place)
            change += left_weight.square() * self._gram.take(place * num_experts + left)
            for right, right_weight in slots[:i]:
                product = 2 * left_weight * right_weight
                change += product * self._gram.take(place * num_experts + right)
        by_window = np.add.reduceat(change.clamp_min_(0).numpy(), self._starts, axis=1)
        losses: FloatArray = np.sqrt(by_window).sum(axis=1)
        return losses


@register(
    "naee",
    "keep the N experts that change the layer's output least, over all drop sets (E <= 16)",
    "arXiv 2402.14800",
    sample_tokens=_SAMPLE_TOKENS,
    scratch_bytes=lambda spec, num_tokens: _scratch_bytes(spec, num_tokens),
)
def naee(task: LayerTask) -> LayerResult:
    """The best set; of equally good ones the first in lexicographic order."""
    num_experts = task.weights.num_experts
    if task.num_experts == num_experts:
        return LayerResult(
            task.weights.select(range(num_experts)), [[i] for i in range(num_experts)]
        )
    loss = OutputLoss(task.sampled())
    if num_experts <= MAX_ENUMERATED_EXPERTS:
        kept, least = best_of_all(task, loss)
    else:
        kept, least = eliminate(task, loss)
    weights = task.weights.select(kept)
    return LayerResult(weights, [[expert_id] for expert_id in kept], {"loss": least})


def best_of_all(task: LayerTask, loss: OutputLoss) -> tuple[tuple[int, ...], float]:
    """(kept ids, loss) of the best of all sets that keep super experts and equal groups."""
    kept_sets = list(_kept_sets(task))
    losses = loss.losses(kept_sets, task.num_experts)
    best = int(losses.argmin())
    return kept_sets[best], float(losses[best])


def eliminate(task: LayerTask, loss: OutputLoss) -> tuple[tuple[int, ...], float]:
    """(kept ids, loss) after dropping one expert per group and round, the least missed first.

    Group-limited routers compare equal groups, so a round drops one expert of every group, each
    chosen while the other groups are whole.
    """
    kept = tuple(range(task.weights.num_experts))
    least = 0.0
    while len(kept) > task.num_experts:
        gone = [_least_missed(task, loss, kept, group) for group in groups(task)]
        kept = tuple(expert_id for expert_id in kept if expert_id not in gone)
        least = float(loss.losses([kept], len(kept))[0])
    return kept, least


def _least_missed(task: LayerTask, loss: OutputLoss, kept: tuple[int, ...], group: range) -> int:
    candidates = [i for i in kept if i in group and not task.is_protected()[i]]
    if not candidates:
        raise InputError(f"layer {task.layer_id}: only super experts are left: keep more experts")
    return candidates[int(loss.losses_without(kept, candidates).argmin())]


def _kept_sets(task: LayerTask) -> Iterator[tuple[int, ...]]:
    """All sets of N ascending ids with every super expert and equally many of each group."""
    per_group = task.num_experts // task.spec.router.num_groups
    protected = task.is_protected()
    choices: list[list[tuple[int, ...]]] = []
    for group in groups(task):
        needed = {i for i in group if protected[i]}
        choices.append([c for c in combinations(group, per_group) if needed <= set(c)])
        if not choices[-1]:
            raise InputError(
                f"layer {task.layer_id} has {len(needed)} super experts in a group that may keep "
                f"{per_group}: keep more experts"
            )
    sets: list[tuple[int, ...]] = [()]
    for options in choices:
        sets = [kept + option for kept in sets for option in options]
    yield from sets


def _gram(samples: LayerSamples) -> Tensor:
    """[T, E, E] float64 inner products of a token's expert outputs."""
    num_experts = samples.logits.shape[1]
    gram = torch.empty(samples.num_tokens, num_experts, num_experts, dtype=torch.float64)
    for tokens, outputs in samples.output_chunks():
        by_token = outputs.transpose(0, 1).double()
        torch.bmm(by_token, by_token.transpose(1, 2), out=gram[tokens])
    return gram


def _scratch_bytes(spec: ModelSpec, num_tokens: int) -> int:
    gram = 8 * num_tokens * spec.num_experts * (spec.num_experts + 3)
    batch = 8 * 6 * max(_BATCH_NUMBERS, num_tokens * spec.num_experts)
    return gram + batch + 2 * all_outputs_bytes(spec)
