"""What a router does without one of its experts: the weights of the rest, and of the next-best.

Letters: T tokens, k top_k, K = k + 1 slots. A token's slots are its chosen experts and, last, the
expert that would be chosen next. All arithmetic is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edge_moe.spec import RouterSpec


@dataclass(frozen=True)
class Slots:
    """The experts that matter to each token."""

    expert_ids: Tensor
    """[T, K] int64; -1 in the last slot where no next-best expert is known."""
    gates: Tensor
    """[T, K] float64, the weights the layer really multiplies with; 0 in the last slot."""
    shares: Tensor
    """[T, K] float64, the weights the router gives when it chooses K experts."""

    @property
    def top_k(self) -> int:
        return self.expert_ids.shape[1] - 1


def fill_slots(chosen: tuple[Tensor, Tensor], wider: tuple[Tensor, Tensor] | None) -> Slots:
    """Join the real choice with that of the same router at top_k + 1.

    `chosen` is (expert ids, weights), [T, k] each; `wider` the same at [T, k + 1], in any order.
    Where the wider choice does not contain the real one (a group limit can change groups), or there
    is none, the last slot stays empty and `shares` are the real weights.
    """
    ids, gates = chosen[0], chosen[1].double()
    empty_id, empty_weight = ids.new_full((len(ids), 1), -1), gates.new_zeros(len(ids), 1)
    shares, next_id, next_share = gates, empty_id, empty_weight
    if wider is not None:
        wider_ids, wider_weights = wider[0], wider[1].double()
        same = wider_ids[:, :, None] == ids[:, None, :]  # [T, K, k]
        agrees = same.any(dim=1).all(dim=1, keepdim=True)  # [T, 1]
        newcomer = (~same.any(dim=2)).int().argmax(dim=1, keepdim=True)  # [T, 1]
        shares = torch.where(agrees, (same * wider_weights[:, :, None]).sum(dim=1), gates)
        next_id = torch.where(agrees, wider_ids.gather(1, newcomer), empty_id)
        next_share = torch.where(agrees, wider_weights.gather(1, newcomer), empty_weight)
    return Slots(
        expert_ids=torch.cat([ids, next_id], dim=1),
        gates=torch.cat([gates, empty_weight], dim=1),
        shares=torch.cat([shares, next_share], dim=1),
    )


def weight_changes(slots: Slots, router: RouterSpec) -> Tensor:
    """[T, k, K] float64: at [t, j, i] the change of slot i's weight once slot j's expert is gone.

    Without expert j the router gives the other slots c_j v_i, v being `shares`:
        c_j = sum v / (sum v - v_j)   when the chosen weights are divided by their sum,
        c_j = 1 / (1 - v_j / scale)   softmax over the remaining experts, not renormalised,
        c_j = 1                       sigmoid scores, not renormalised.
    1 - v_j is bounded below by the other slots' sum, which float32 still resolves when v_j rounds
    to 1. If that sum is zero too, the token is taken to lose its MoE output.
    """
    top_k, num_slots = slots.top_k, slots.top_k + 1
    others = slots.shares[:, None, :] * (1 - torch.eye(top_k, num_slots, dtype=torch.float64))
    rest = others.sum(dim=2)  # [T, k]
    if router.renormalises:
        factor = slots.shares.sum(dim=1, keepdim=True) / rest
    elif router.score_function == "softmax":
        factor = router.scale / torch.maximum(router.scale - slots.shares[:, :top_k], rest)
    else:
        factor = torch.ones_like(rest)
    factor = torch.where(rest > 0, factor, 0.0)
    return others * factor[:, :, None] - slots.gates[:, None, :]
