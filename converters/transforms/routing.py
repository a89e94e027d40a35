"""The layer's own router on a subset of its experts, for many subsets at once.

Routing is never written again here: a copy of transformers' router is given raw logits through an
identity matrix, so scoring, selection bias, groups, renormalisation and scale are its own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

_BIAS = "e_score_correction_bias"
_NEVER = -1e30  # finite: the identity matrix multiplies it with zeros


class SubsetRouter:
    """Chooses among N of the experts whose raw logits are known."""

    def __init__(self, router: Any, logits: Tensor, num_experts: int) -> None:
        """`router` is transformers' module, `logits` [T, E] what it computed, `num_experts` N."""
        self._logits = logits
        self._bias: Tensor | None = getattr(router, _BIAS, None)
        self._router = copy.deepcopy(router)
        self._router.weight = nn.Parameter(torch.eye(num_experts), requires_grad=False)
        self._router.num_experts = self._router.hidden_dim = num_experts

    def route(self, subsets: Tensor, gone: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, N] ascending expert ids -> (chosen ids, weights), [B, T, k] each, in any order.

        `gone` [B] is an expert of each subset that keeps its place and is never chosen: so a group
        of a group-limited router can be one short, which the module itself cannot hold.
        """
        num_subsets, num_kept = subsets.shape
        num_tokens = len(self._logits)
        logits = self._logits[:, subsets].transpose(0, 1)  # [B, T, N]
        bias = None if self._bias is None else self._bias[subsets]
        if gone is not None:
            never = subsets == gone[:, None]
            logits = logits.masked_fill(never[:, None], _NEVER)
            bias = None if bias is None else bias.masked_fill(never, -torch.inf)
        if bias is not None:
            bias = bias[:, None].expand(-1, num_tokens, -1)
            setattr(self._router, _BIAS, bias.reshape(-1, num_kept))
        _, weights, positions = self._router(logits.reshape(-1, num_kept))
        shape = num_subsets, num_tokens, -1
        ids = subsets[:, None].expand(-1, num_tokens, -1).gather(2, positions.reshape(shape))
        return ids, weights.reshape(shape)
