"""What a router does without one of its experts: the weights of the rest, and of the next-best.

Letters: T tokens, k top_k, K = k + 1 slots. A token's slots are its chosen experts and, last, the
expert that would be chosen next. All arithmetic is float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edge_moe.router_spec import RouterSpec

_NEVER = -1e30  # finite: the differences that sparsemixer takes stay numbers


@dataclass(frozen=True)
class Slots:
    """The experts that matter to each token."""

    expert_ids: Tensor
    """[T, K] int64; -1 in the last slot where no next-best expert is known."""
    gates: Tensor
    """[T, K] float64, the weights the layer really multiplies with; 0 in the last slot."""
    shares: Tensor
    """[T, K] float64, the weights the router gives when it chooses K experts."""
    scales: Tensor | None = None
    """[T, K] float64 factors of the experts, which the weights hold already; None for ones."""
    logits: Tensor | None = None
    """[T, E] raw logits, where the weights cannot be told from `shares` (sparsemixer)."""

    @property
    def top_k(self) -> int:
        return self.expert_ids.shape[1] - 1

    def scaled_by(self, expert_scale: Tensor) -> Slots:
        """These slots, whose weights hold factors [E] of the experts."""
        factors = expert_scale.double()[self.expert_ids.clamp(min=0)]
        return replace(self, scales=factors)

    def detached(self) -> Slots:
        """The same numbers, cut off from autograd."""
        return replace(self, gates=self.gates.detach(), shares=self.shares.detach())


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
    to 1. If that sum is zero too, the token is taken to lose its MoE output. Where weights hold
    factors of the experts, v stands for the weights without them.
    """
    if slots.logits is not None:
        return _sparsemixer_changes(slots, slots.logits, router.jitter)
    top_k, num_slots = slots.top_k, slots.top_k + 1
    kept = 1 - torch.eye(top_k, num_slots, dtype=torch.float64)
    others = slots.shares[:, None, :] * kept
    shares = slots.shares
    if slots.scales is not None:
        shares = torch.where(slots.scales != 0, shares / slots.scales, 0.0)
    rest = (shares[:, None, :] * kept).sum(dim=2)  # [T, k]
    if router.renormalises:
        factor = shares.sum(dim=1, keepdim=True) / rest
    elif router.score_function == "softmax":
        factor = router.scale / torch.maximum(router.scale - shares[:, :top_k], rest)
    else:
        factor = torch.ones_like(rest)
    factor = torch.where(rest > 0, factor, 0.0)
    return others * factor[:, :, None] - slots.gates[:, None, :]


def sparsemixer_slots(logits: Tensor, ids: Tensor, weights: Tensor) -> Slots:
    """The slots of Phi's router, which takes the two largest logits [T, E] one after the other."""
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    next_id = logits.masked_fill(chosen, -torch.inf).argmax(dim=1, keepdim=True)
    gates = torch.cat([weights.double(), weights.new_zeros(len(ids), 1).double()], dim=1)
    return Slots(torch.cat([ids, next_id], dim=1), gates, gates, logits=logits)


def _sparsemixer_changes(slots: Slots, logits: Tensor, jitter: float) -> Tensor:
    """As `weight_changes`: the router is asked again without each chosen expert.

    Its weights are softmax over the logits near the largest one, so no formula in the weights of
    all experts gives them.
    """
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    changes = []
    for slot in range(slots.top_k):
        gone = slots.expert_ids[:, slot, None]
        masked = logits.scatter(1, gone, _NEVER)
        weights, ids = sparsemixer(masked, jitter_eps=jitter, training=False, top_k=slots.top_k)
        same = slots.expert_ids[:, :, None] == ids[:, None, :]  # [T, K, k]
        found = (same * weights.double()[:, None, :]).sum(dim=2)
        changes.append(found - slots.gates)
    return torch.stack(changes, dim=1)
