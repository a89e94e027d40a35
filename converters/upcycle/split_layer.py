"""One dense FFN taken apart: where its neurons go, and the router that chooses among the experts.

Letters as in `split_neurons`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edge_moe.converters.upcycle.split_neurons import DenseFfn, NeuronSplit, split_neurons
from edge_moe.converters.upcycle.split_router import NormalEquations, router_rows

_EVERY_TOKEN = 3
"""Neurons are clustered on every third token."""


@dataclass(frozen=True)
class SplitLayer:
    """Where the neurons of a layer went, and the router that chooses among the experts."""

    split: NeuronSplit
    router: Tensor
    """[E, H], exact in bfloat16"""
    recall: float
    """Share of the top_k experts of most energy that the router finds, on the calibration text."""


def split_layer(
    ffn: DenseFfn,
    inputs: Tensor,
    activations: Tensor,
    *,
    num_experts: int,
    expert_width: int,
    top_k: int,
    ridge: float,
    spread: float,
    generator: torch.Generator,
) -> SplitLayer:
    """Cluster the neurons and fit the router; `inputs` [T, H] give the `activations` [T, F]."""
    strengths = ffn.strengths(activations)
    num_shared = strengths.shape[1] - num_experts * expert_width
    split = split_neurons(strengths[::_EVERY_TOKEN], num_shared, num_experts, generator)
    energy = split.energy(strengths)
    equations = NormalEquations.zeros(inputs.shape[1], num_experts)
    equations.add(inputs, energy)
    router = router_rows(equations, ridge, spread).bfloat16().float()
    found = choose(router, inputs, top_k)
    is_best = torch.zeros_like(energy).scatter_(1, energy.topk(top_k, dim=1).indices, 1.0)
    return SplitLayer(split, router, recall=float(is_best.gather(1, found).mean()))


def choose(router: Tensor, inputs: Tensor, top_k: int) -> Tensor:
    """The experts of each token, [T, K]."""
    return (inputs @ router.T).topk(top_k, dim=1).indices
