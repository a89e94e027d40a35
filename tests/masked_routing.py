"""The source model with dropped experts masked out of its routers: what pruning must equal."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor, nn

from edge_moe.plan import Plan
from edge_moe.runtime.moe_block import MoeBlock
from edge_moe.spec import ModelSpec


def mask_routers(model: nn.Module, plan: Plan, spec: ModelSpec) -> None:
    """Give dropped experts a router logit of -inf, so that none is ever chosen."""
    for layer_id, row in zip(plan.moe_layer_ids, plan.forms, strict=True):
        block = MoeBlock(model, spec, layer_id)
        dropped = [index for index, form in enumerate(row) if form == "drop"]
        if spec.router.has_selection_bias:
            bias = block.tensor(spec.router_module_names(layer_id)[-1])
            bias[..., dropped] = -torch.inf
        _mask_linear(block.router, dropped)


def _mask_linear(router: nn.Module, dropped: list[int]) -> None:
    forward, linear = router.forward, torch.nn.functional.linear

    def masked_linear(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(values, weight, bias).index_fill(
            -1, torch.tensor(dropped, dtype=torch.long), -torch.inf
        )

    def masked_forward(*inputs: Tensor) -> object:
        with mock.patch("torch.nn.functional.linear", masked_linear):
            return forward(*inputs)

    router.forward = masked_forward
