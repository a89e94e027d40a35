"""One dense SwiGLU network -> an always-on part, equal experts, and a router that chooses them.

Splitting a trained FFN by the neurons that fire together, with balanced clusters: MoEfication
(arXiv 2110.01786). An always-on part of the busiest neurons beside them: CMoE (arXiv 2502.04416).
Differences: CMoE ranks neurons by how often they are among a token's largest and routes by one
representative neuron per expert; here the always-on part holds the largest contributions, and the
router is fitted to every expert's contribution. MoEfication trains a small network as router.

Letters in shapes: T tokens, H hidden size, F neurons of the dense network, S always-on neurons,
E experts, I neurons per expert; F = S + E I.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

MAX_ROUNDS = 10
"""Clusters settle within a few rounds; later rounds move single neurons."""


@dataclass(frozen=True)
class DenseFfn:
    """y = down (silu(gate x) * (up x))."""

    gate: Tensor
    """[F, H]"""
    up: Tensor
    """[F, H]"""
    down: Tensor
    """[H, F]"""

    def activations(self, inputs: Tensor) -> Tensor:
        """What down_proj is applied to, [T, F], of `inputs` [T, H]."""
        return functional.silu(inputs @ self.gate.T) * (inputs @ self.up.T)

    def output(self, inputs: Tensor) -> Tensor:
        """y, [..., H], of `inputs` [..., H]."""
        return functional.linear(self.activations(inputs), self.down)

    def strengths(self, activations: Tensor) -> Tensor:
        """Norm of what each neuron adds to the output, [T, F]."""
        norms: Tensor = torch.linalg.vector_norm(self.down, dim=0)
        return activations.abs() * norms


@dataclass(frozen=True)
class NeuronSplit:
    """Which neuron of the dense network goes where; every neuron has one place."""

    shared: Tensor
    """Always-on neurons, [S]."""
    experts: Tensor
    """Neurons of each expert, [E, I]."""

    def energy(self, strengths: Tensor) -> Tensor:
        """Root of the sum of squares over each expert's neurons, [T, E], of `strengths` [T, F]."""
        return strengths[:, self.experts].square().sum(-1).sqrt()


def split_neurons(
    strengths: Tensor, num_shared: int, num_experts: int, generator: torch.Generator
) -> NeuronSplit:
    """The neurons with the largest mean square strength are always on, the rest are clustered.

    Two neurons are alike when the same tokens make them strong: among the strongest 15 % of the
    clustered neurons. `strengths` [T, F].
    """
    order = strengths.square().mean(0).argsort(descending=True)
    shared, rest = order[:num_shared].sort().values, order[num_shared:].sort().values
    strong = strengths[:, rest]
    weakest = math.ceil(0.85 * (strong.shape[1] - 1))  # of those that fire, from below
    threshold = strong.kthvalue(weakest + 1, dim=1, keepdim=True).values
    fires = (strong >= threshold).float().T  # [F - S, T]
    return NeuronSplit(shared, rest[balanced_clusters(fires, num_experts, generator)])


def balanced_clusters(vectors: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Spherical k-means with clusters of equal size: member numbers [E, N / E] of `vectors` [N, T].

    Each round solves the assignment of all vectors to the places of all clusters exactly.
    """
    num_vectors = len(vectors)
    size, remainder = divmod(num_vectors, num_clusters)
    if remainder:
        raise ValueError(f"{num_vectors} neurons do not divide into {num_clusters} equal experts")
    unit = functional.normalize(vectors, dim=1, eps=1e-6)
    first = torch.randperm(num_vectors, generator=generator)[:num_clusters]
    centres, members = unit[first], torch.empty(0)
    for _ in range(MAX_ROUNDS):
        likeness = (unit @ centres.T).repeat_interleave(size, dim=1)  # one column per place
        rows, places = linear_sum_assignment(likeness.numpy(), maximize=True)
        cluster = torch.empty(num_vectors, dtype=torch.int64)
        cluster[torch.from_numpy(rows)] = torch.from_numpy(places) // size
        found = cluster.argsort(stable=True).view(num_clusters, size)
        if torch.equal(found, members):
            break
        members = found
        centres = functional.normalize(unit[members].mean(1), dim=1, eps=1e-6)
    return members
