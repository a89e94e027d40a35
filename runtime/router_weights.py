"""What a router weighs experts by that somebody else has chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_moe.errors import InputError
from edge_moe.router_spec import RouterSpec

WEIGHED = ("softmax", "sigmoid")
"""Score functions that give every expert a weight, whoever is chosen."""


def require_weighable(router: RouterSpec, model_type: str) -> None:
    """Raise InputError where a router's weights follow from its own way of choosing only."""
    if router.score_function not in WEIGHED:
        raise InputError(
            f"the router of {model_type} ({router.score_function}) weighs no experts but those it "
            "chooses itself: leave the pre-gate out"
        )


def expert_weights(
    router: RouterSpec, logits: Tensor, rows: Tensor, expert_scale: Tensor | None = None
) -> Tensor:
    """[T, K] float32: the weights of the experts in `rows` [T, K], from raw logits [T, E].

    The same as the router's own where it has chosen them: scores of all experts, gathered, divided
    by their sum where the family does so, times its scale and `expert_scale` [E].
    """
    values = logits.float()
    scores = values.sigmoid() if router.score_function == "sigmoid" else values.softmax(dim=-1)
    weights = scores.gather(1, rows)
    if router.renormalises:
        smallest = torch.finfo(weights.dtype).tiny
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=smallest)
    weights = weights * router.scale
    return weights if expert_scale is None else weights * expert_scale.float()[rows]
