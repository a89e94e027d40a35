"""Experts of any family from stacks in one layout: gate_up_proj [E, 2I, H], down_proj [E, H, I].

transformers' own implementations want some families' stacks transposed.
Letters: T tokens, E experts, H hidden_size, I expert_width, k top_k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from edge_moe.runtime.moe_block import expert_output

STACKED = "edge_moe_stacked"
"""Name of the experts implementation."""


def run_stacked(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs: [T, H], [T, k], [T, k] -> [T, H]."""
    output = torch.zeros_like(hidden)
    for expert_id in ids.unique().tolist():  # type: ignore[no-untyped-call]
        token, slot = (ids == expert_id).nonzero(as_tuple=True)
        gate_up, down = experts.gate_up_proj[expert_id], experts.down_proj[expert_id]
        mine = expert_output(experts, hidden[token], gate_up, down, expert_id)
        output.index_add_(0, token, mine * weights[token, slot, None].to(mine.dtype))
    return output


ALL_EXPERTS_FUNCTIONS.register(STACKED, run_stacked)
