"""The penalty for sending all tokens to few experts."""

from __future__ import annotations

import torch
from torch import Tensor


def switch_loss(probabilities: Tensor, expert_ids: Tensor) -> Tensor:
    """E * sum over experts of (share of choices * mean probability); 1 where all are equal.

    `probabilities` [T, E] sum to 1 per token, `expert_ids` [T, K] are those chosen. Switch
    Transformers, arXiv:2101.03961, eq. 4.
    """
    num_experts = probabilities.shape[-1]
    shares = torch.bincount(expert_ids.reshape(-1), minlength=num_experts) / expert_ids.numel()
    return num_experts * (shares * probabilities.mean(0)).sum()
