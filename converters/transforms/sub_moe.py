"""Sub-MoE (arXiv 2506.23266): cluster experts by what they compute, and average each cluster.

Similarity of two experts is the mean over tokens of the cosine of their outputs on the same inputs.
k-means++ runs on the outputs, each scaled to length 1: distances between such vectors follow from
the mean cosines alone, so only an [E, E] matrix is kept (k-means in its kernel form).

The paper concatenates a projection's matrices, [W_1 .. W_n] = U S [V_1 .. V_n]^T, and averages the
V_i by frequency f. Without truncation that is exactly the frequency-weighted mean of the W_i, so
the mean is what is computed here. Its truncated variant whitens first: [W_1 C_1 .. W_n C_n] with
C_i C_i^T the second moment of projection i's inputs, and drops the smallest singular values. With
U_r the singular vectors that stay, U_r S_r V_i^T C_i^-1 = U_r U_r^T W_i, so the result is the
projection U_r U_r^T of the same mean, and U_r are the leading eigenvectors of
sum_i W_i C_i C_i^T W_i^T: the second moment of the projection's outputs. Both identities are tests.

Differences to the paper: cluster counts are the same for every layer, as loadable formats need,
instead of shared by two adjacent layers; a cluster has one router row (see `m_smoe`) instead of
rows that share an expert. The paper averages hidden units as they are stored, which suits experts
that grew out of one dense FFN; `align=yes` matches them first, as M-SMoE does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
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
    all_outputs_bytes,
    register,
)
from edge_moe.converters.transforms.merging import (
    ROUTER_SETTING,
    align_groups,
    merge_bytes,
    merge_groups,
)
from edge_moe.converters.transforms.selection import groups
from edge_moe.errors import InputError

IntArray = npt.NDArray[np.int64]

_RESTARTS = 10
_MAX_ROUNDS = 100


@register(
    "sub-moe",
    "cluster experts on their outputs, average each cluster by frequency",
    "arXiv 2506.23266",
    settings={
        "router": ROUTER_SETTING,
        "align": Setting("no", "match hidden units before averaging", words=("no", "yes")),
        "truncate": Setting(0.0, "share of singular values dropped from merged matrices", 0, 0.99),
        "seed": Setting(0, "seed of k-means++", 0, 2**31),
    },
    sample_tokens=SAMPLE_TOKENS,
    scratch_bytes=lambda spec, num_tokens: (
        all_outputs_bytes(spec)
        + merge_bytes(spec)
        + 4 * spec.num_experts * spec.expert_weights
        + 8 * num_tokens * (3 * spec.expert_width + spec.hidden_size)
        + 32 * max(spec.expert_width, spec.hidden_size) ** 2
    ),
)
def sub_moe(task: LayerTask) -> LayerResult:
    """One expert per cluster, ordered by its most frequent member."""
    frequency = task.score("frequency")
    members = _clusters(task, frequency)
    router = str(task.settings["router"])
    weights = task.weights
    if task.settings["align"] == "yes":
        weights = align_groups(weights, members)
    result = merge_groups(weights, members, frequency, None, router)
    if task.number("truncate") > 0:
        for new_id, group in enumerate(members):
            if len(group) > 1:
                _truncate(task, weights, result.weights, new_id, group)
    return result


def output_cosines(samples: LayerSamples) -> FloatArray:
    """[E, E] mean over tokens of the cosine of two experts' outputs."""
    num_experts = samples.logits.shape[1]
    total = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for _, outputs in samples.output_chunks():
        unit = torch.nn.functional.normalize(outputs, dim=2, eps=1e-30).flatten(1)
        total += (unit @ unit.T).double()
    cosines: FloatArray = (total / samples.num_tokens).numpy()
    return cosines


def kernel_kmeans(gram: FloatArray, num_clusters: int, seed: int) -> list[list[int]]:
    """Cluster n points given by their inner products [n, n]; the best of ten seeded k-means++ runs.

    Equal seeds and equally ordered points give equal clusters; no cluster is empty.
    """
    generator = np.random.default_rng(seed)
    runs = [_lloyd(gram, _seeds(gram, num_clusters, generator)) for _ in range(_RESTARTS)]
    inertias = [_distances(gram, labels, num_clusters).min(axis=1).sum() for labels in runs]
    labels = runs[int(np.argmin(inertias))]
    return [[int(i) for i in np.flatnonzero(labels == c)] for c in range(num_clusters)]


def _clusters(task: LayerTask, frequency: FloatArray) -> list[list[int]]:
    """Members of every new expert, the most frequent first; super experts stay alone."""
    num_groups = task.spec.router.num_groups
    protected = task.is_protected()
    cosines = None
    found: list[list[int]] = []
    for group in groups(task):
        alone = [i for i in group if protected[i]]
        rest = sorted((i for i in group if not protected[i]), key=lambda i: (-frequency[i], i))
        num_clusters = task.num_experts // num_groups - len(alone)
        if num_clusters < (1 if rest else 0):
            raise InputError(
                f"layer {task.layer_id} has {len(alone)} super experts to leave alone: keep more "
                f"than {task.num_experts} experts"
            )
        found += [[i] for i in alone]
        if num_clusters >= len(rest):
            found += [[i] for i in rest]
            continue
        cosines = output_cosines(task.sampled()) if cosines is None else cosines
        parts = kernel_kmeans(cosines[np.ix_(rest, rest)], num_clusters, int(task.number("seed")))
        found += [[rest[i] for i in part] for part in parts]
    return sorted(found)


def _seeds(gram: FloatArray, num_clusters: int, generator: np.random.Generator) -> list[int]:
    """k-means++: each next seed is drawn with probability proportional to its squared distance."""
    square = np.diag(gram)
    seeds = [int(generator.integers(len(gram)))]
    while len(seeds) < num_clusters:
        distance = square[:, None] - 2 * gram[:, seeds] + square[seeds]
        nearest = distance.min(axis=1).clip(0)
        nearest[seeds] = 0
        left = [i for i in range(len(gram)) if i not in seeds]
        total = nearest.sum()
        if total > 0:
            seeds.append(int(generator.choice(len(gram), p=nearest / total)))
        else:  # only copies of the seeds are left
            seeds.append(left[0])
    return seeds


def _lloyd(gram: FloatArray, seeds: Sequence[int]) -> IntArray:
    """[n] labels after convergence, starting from points as centres."""
    square = np.diag(gram)
    labels: IntArray = (square[list(seeds)] - 2 * gram[:, list(seeds)]).argmin(axis=1)
    labels[list(seeds)] = np.arange(len(seeds))
    for _ in range(_MAX_ROUNDS):
        distances = _distances(gram, labels, len(seeds))
        new = distances.argmin(axis=1)
        for cluster in range(len(seeds)):
            if not (new == cluster).any():  # give it the point that fits its own cluster least
                counts = np.bincount(new, minlength=len(seeds))
                worst = np.where(counts[new] > 1, distances[np.arange(len(new)), new], -np.inf)
                new[int(worst.argmax())] = cluster
        if (new == labels).all():
            break
        labels = new
    return labels


def _distances(gram: FloatArray, labels: IntArray, num_clusters: int) -> FloatArray:
    """[n, clusters] squared distance of every point to the mean of every cluster."""
    member = (labels[:, None] == np.arange(num_clusters)).astype(np.float64)
    share = member / np.maximum(member.sum(axis=0), 1)
    to_mean = gram @ share
    mean_square = (share * to_mean).sum(axis=0)
    distances: FloatArray = np.diag(gram)[:, None] - 2 * to_mean + mean_square
    return distances


def _truncate(
    task: LayerTask,
    weights: LayerWeights,
    result: LayerWeights,
    new_id: int,
    group: Sequence[int],
) -> None:
    """Project merged matrices on the directions in which the outputs of `weights` vary most."""
    samples, keep_share = task.sampled(), 1 - task.number("truncate")
    width, gate_up = weights.expert_width, weights.gate_up

    def project(merged: Tensor, outputs: Callable[[int, Tensor], Tensor]) -> Tensor:
        moment = torch.zeros(len(merged), len(merged), dtype=torch.float64)
        for expert_id in group:
            tokens, _ = samples.routed(expert_id)
            values = outputs(expert_id, tokens).double()
            moment += values.T @ values
        return leading_projection(moment, keep_share) @ merged.double()

    def gate(expert_id: int, tokens: Tensor) -> Tensor:
        return samples.inputs[tokens] @ gate_up[expert_id, :width].T

    def up(expert_id: int, tokens: Tensor) -> Tensor:
        return samples.inputs[tokens] @ gate_up[expert_id, width:].T

    def final(expert_id: int, tokens: Tensor) -> Tensor:
        return samples.output(expert_id, tokens)

    result.gate_up[new_id, :width] = project(result.gate_up[new_id, :width], gate).float()
    result.gate_up[new_id, width:] = project(result.gate_up[new_id, width:], up).float()
    result.down[new_id] = project(result.down[new_id], final).float()


def leading_projection(moment: Tensor, keep_share: float) -> Tensor:
    """[n, n] projection on the leading eigenvectors of `moment` [n, n], ceil(keep_share n) many.

    The identity where the moment is 0, as of experts that no token chose: no direction leads.
    """
    if not bool(moment.any()):
        return torch.eye(len(moment), dtype=moment.dtype)
    num_kept = int(np.ceil(keep_share * len(moment)))
    _, vectors = torch.linalg.eigh(moment)
    leading: Tensor = vectors[:, len(moment) - num_kept :]
    return leading @ leading.T
