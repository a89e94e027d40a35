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
from edge_moe.spec import ModelSpec
from edge_moe.tensor_info import FloatArray

Stacks = tuple[Tensor, Tensor]
"""(gate_up_proj [E, 2I, H], down_proj [E, H, I]); [E, I, H] first where there is no gate."""

STACKED = "edge_moe_stacked"
"""Name of the experts implementation."""


def empty_stacks(spec: ModelSpec, num_experts: int) -> Stacks:
    """Memory for as many experts, float32."""
    hidden, width = spec.expert_hidden, spec.expert_width
    return torch.empty(num_experts, spec.inner_rows, hidden), torch.empty(
        num_experts, hidden, width
    )


def put_expert(
    stacks: Stacks, place: int, expert: tuple[FloatArray, FloatArray, FloatArray]
) -> None:
    """Write (gate_proj, up_proj, down_proj) into row `place`; gate_proj may have no rows."""
    gate, up, down = expert
    gate_up = stacks[0].numpy()[place]
    gate_up[: len(gate)], gate_up[len(gate) :] = gate, up
    stacks[1].numpy()[place] = down


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
