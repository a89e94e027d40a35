"""REAM (arXiv 2604.04356): merge experts into the N most salient, layer after layer.

Centroids are the N experts of largest REAP score, mean g|f| over routed tokens. From the most
salient one down, each absorbs the most similar experts that are still free, up to `group_size`
members, so most centroids usually stay alone. Similarity of two experts is the mean of
- the cosine, mapped to 0..1, of their mean gate-weighted outputs over routed tokens, and
- 1 - d / 2, with d the Euclidean distance of their raw router-logit columns, scaled to length 1.
Hidden units are matched at the sum of two distances: of the units' activations on sampled tokens,
scaled to length 1, and of their weights in the leading 64 principal components. The mean is
weighted by saliency; the centroid's router row and selection bias stay, the others go. Then the
layer runs again, so that the next layer sees compressed inputs.

The released code hands outputs that are already gate-weighted to the REAP score, which makes it
mean g**2 |f|; the gate counts once here, as in the paper. It takes gates from a softmax over all
experts; here they are the weights the layer really used.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edge_moe.converters.transforms.base import (
    SAMPLE_TOKENS,
    FloatArray,
    LayerResult,
    LayerSamples,
    LayerTask,
    LayerWeights,
    Setting,
    register,
)
from edge_moe.converters.transforms.m_smoe import column_cosines
from edge_moe.converters.transforms.merging import Cost, hidden_units, merge_bytes, merge_groups
from edge_moe.converters.transforms.selection import kept_by_score, receivers

_ALIGNMENT_TOKENS = 1024
_COMPONENTS = 64


@register(
    "ream",
    "merge experts into the N most salient, aligned; the next layer sees the merged one",
    "arXiv 2604.04356",
    settings={"group_size": Setting(16, "most experts that become one", 1, 2**31)},
    sample_tokens=SAMPLE_TOKENS,
    is_sequential=True,
    scratch_bytes=lambda spec, num_tokens: (
        merge_bytes(spec)
        + 8 * num_tokens * spec.num_experts * 2
        + 4 * num_tokens * spec.hidden_size * 2
        + 8 * (_ALIGNMENT_TOKENS * 4 * spec.expert_width + 16 * spec.expert_width**2)
    ),
)
def ream(task: LayerTask) -> LayerResult:
    """One expert per centroid, in their old order."""
    samples = task.sampled()
    scores, means = routed_sums(samples)
    kept = kept_by_score(task, scores)
    members = absorb(task, kept, scores, similarities(samples.logits, means))
    cost = _alignment_cost(samples, task.weights)
    return merge_groups(task.weights, members, scores, cost)


def routed_sums(samples: LayerSamples) -> tuple[FloatArray, Tensor]:
    """([E] REAP scores, [E, H] float64 mean gate-weighted outputs); zero where none is routed."""
    num_experts = samples.logits.shape[1]
    scores = np.zeros(num_experts)
    means = torch.zeros(num_experts, samples.inputs.shape[1], dtype=torch.float64)
    for expert_id in range(num_experts):
        tokens, gates = samples.routed(expert_id)
        if len(tokens):
            outputs = samples.output(expert_id, tokens).double()
            scores[expert_id] = float((gates * outputs.norm(dim=1)).mean())
            means[expert_id] = (gates[:, None] * outputs).mean(dim=0)
    return scores, means


def similarities(logits: Tensor, means: Tensor) -> FloatArray:
    """[E, E] from router logits [T, E] and mean gate-weighted outputs [E, H]."""
    by_output = (1 + column_cosines(means.T)) / 2
    distance = np.sqrt((2 - 2 * column_cosines(logits)).clip(0))
    mean: FloatArray = (by_output + 1 - distance / 2) / 2
    return mean


def absorb(
    task: LayerTask, kept: list[int], scores: FloatArray, similarity: FloatArray
) -> list[list[int]]:
    """Members of every centroid, itself first, centroids ascending.

    Where every centroid is full before all experts found a place, the group size grows by as much
    as needed; super experts absorb nothing.
    """
    allowed = receivers(task, kept)
    members = {centroid: [centroid] for centroid in kept}
    free = [i for i in range(task.weights.num_experts) if i not in members]
    size = int(task.number("group_size"))
    while free:
        for centroid in sorted(kept, key=lambda i: (-scores[i], i)):
            near = [i for i in free if allowed[i, centroid]]
            near.sort(key=lambda i: (-similarity[centroid, i], i))
            taken = near[: max(0, size - len(members[centroid]))]
            members[centroid] += taken
            free = [i for i in free if i not in taken]
        size += 1
    return [members[centroid] for centroid in kept]


def _alignment_cost(samples: LayerSamples, weights: LayerWeights) -> Cost:
    step = max(1, -(-samples.num_tokens // _ALIGNMENT_TOKENS))
    tokens = torch.arange(0, samples.num_tokens, step)

    def activations(expert_id: int) -> Tensor:
        return torch.nn.functional.normalize(samples.inner(expert_id, tokens).T, dim=1).double()

    def cost(reference: int, other: int) -> FloatArray:
        left, right = principal_components(
            hidden_units(weights, reference), hidden_units(weights, other)
        )
        distance = torch.cdist(activations(reference), activations(other))
        distance += torch.cdist(left, right)
        found: FloatArray = distance.numpy()
        return found

    return cost


def principal_components(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of the rows of both in the leading components of all rows together, float64."""
    rows = torch.cat([left, right]).double()
    rows = rows - rows.mean(dim=0)
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    coordinates = vectors * values.clamp_min(0).sqrt()
    leading = coordinates[:, -_COMPONENTS:]
    return leading[: len(left)], leading[len(left) :]
