"""Watching a MoE block at work: the routing it really used, and what each expert contributed.

The block is transformers' own. An experts implementation, registered under `OBSERVE`, is called
with the hidden states, the chosen ids and their weights, so no router is ever written again here.
Letters: T tokens of one window, H hidden_size, E experts, k top_k, K = k + 1 slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from edge_moe.converters.rerouting import Slots, fill_slots, weight_changes
from edge_moe.spec import ModelSpec

OBSERVE = "edge_moe_observe"
"""Name of the experts implementation."""

FloatArray64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class WindowObservation:
    """What one window did in one MoE layer. Everything but the last three is summed over tokens."""

    routed_tokens: npt.NDArray[np.int64]
    """[E]"""
    max_output: FloatArray64
    """[E] largest |element| of the un-gated output."""
    expert_sums: dict[str, FloatArray64]
    """[E] each, keyed by `edge_moe.stats.EXPERT_SUMS`."""
    drop_loss: FloatArray64
    """[E] |change of the MoE output|**2 when the router has to do without the expert."""
    moe_square: float
    """|output of the MoE block|**2, shared experts included."""
    inputs: Tensor
    """[T, H] what the block was given."""
    expert_ids: Tensor
    """[T, k]"""
    gates: Tensor
    """[T, k] float64 real weights."""


def expert_output(experts: Any, inputs: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Un-gated output [n, H] of one expert; gate_up [2I, H], down [H, I]."""
    return F.linear(experts._apply_gate(F.linear(inputs, gate_up)), down)


class BlockObserver:
    """Attach to one MoE block; after each forward pass of one window, `take()` the observation."""

    def __init__(self, block: Any, spec: ModelSpec) -> None:
        self._block = block
        self._experts = block.experts
        self._spec = spec
        router = spec.router
        eligible = router.top_groups * (spec.num_experts // router.num_groups)
        self._has_next_best = spec.top_k < eligible
        self._is_probing = False
        self._probed: tuple[Tensor, Tensor] | None = None
        self._seen: WindowObservation | None = None
        self._moe_square = 0.0
        self._hook = block.register_forward_hook(self._after_block)
        self._experts.observer = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()
        del self._experts.observer

    def take(self) -> WindowObservation:
        """The observation of the last forward pass."""
        seen, self._seen = self._seen, None
        if seen is None:
            raise RuntimeError("the MoE block was not run through the experts interface")
        return WindowObservation(**(vars(seen) | {"moe_square": self._moe_square}))

    def observe(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The experts' forward pass, [T, H], [T, k], [T, k] -> [T, H]."""
        if self._is_probing:
            self._probed = ids, weights
            return torch.zeros_like(hidden)
        wider = self._probe(hidden) if self._has_next_best else None
        slots = fill_slots((ids, weights), wider)
        outputs = self._slot_outputs(hidden, slots.expert_ids)
        self._record(hidden, slots, outputs)
        return mix(slots.gates, outputs)

    def _record(self, hidden: Tensor, slots: Slots, outputs: Tensor) -> None:
        """Keep what `take` will return."""
        self._seen = self._summarise(hidden, slots, outputs)

    def _probe(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, weights), [T, k + 1] each: the block's own choice of one expert more."""
        router = self._block.gate
        self._is_probing = True
        router.top_k += 1
        try:
            self._block(hidden[None])
        finally:
            router.top_k -= 1
            self._is_probing = False
        if self._probed is None:
            raise RuntimeError("the router did not answer the probe")
        return self._probed

    def _after_block(self, block: nn.Module, arguments: object, output: Tensor) -> None:
        if not self._is_probing:
            self._moe_square = float(output.double().square().sum())

    def _slot_outputs(self, hidden: Tensor, expert_ids: Tensor) -> Tensor:
        """[T, K, H] un-gated output of every slot's expert; zero in an empty slot."""
        outputs = hidden.new_zeros(*expert_ids.shape, hidden.shape[1])
        for expert_id in np.unique(expert_ids.numpy()[expert_ids.numpy() >= 0]):
            token, slot = (expert_ids == expert_id).nonzero(as_tuple=True)
            gate_up, down = (
                self._experts.gate_up_proj[expert_id],
                self._experts.down_proj[expert_id],
            )
            outputs[token, slot] = expert_output(self._experts, hidden[token], gate_up, down)
        return outputs

    def _summarise(self, hidden: Tensor, slots: Slots, outputs: Tensor) -> WindowObservation:
        num_experts, top_k = self._spec.num_experts, slots.top_k
        ids, gates = slots.expert_ids[:, :top_k], slots.gates[:, :top_k]
        flat_ids = ids.flatten().numpy()
        norms = outputs[:, :top_k].double().norm(dim=2)
        gated = gates * norms

        def by_expert(values: Tensor) -> FloatArray64:
            sums = np.bincount(flat_ids, weights=values.flatten().numpy(), minlength=num_experts)
            return sums.astype(np.float64)

        max_output = np.zeros(num_experts)
        np.maximum.at(max_output, flat_ids, outputs[:, :top_k].abs().amax(dim=2).flatten().numpy())
        return WindowObservation(
            routed_tokens=np.bincount(flat_ids, minlength=num_experts),
            max_output=max_output,
            expert_sums={
                "gate": by_expert(gates),
                "output_norm": by_expert(norms),
                "gated_norm": by_expert(gated),
                "gated_square": by_expert(gated.square()),
            },
            drop_loss=by_expert(_drop_losses(slots, outputs, self._spec)),
            moe_square=0.0,
            inputs=hidden,
            expert_ids=ids,
            gates=gates,
        )


def _drop_losses(slots: Slots, outputs: Tensor, spec: ModelSpec) -> Tensor:
    """[T, k] float64 |change of the MoE output|**2 when each chosen expert is dropped."""
    changes = weight_changes(slots, spec.router)
    columns = [
        mix(changes[:, slot], outputs).double().square().sum(dim=1) for slot in range(slots.top_k)
    ]
    return torch.stack(columns, dim=1)


def mix(weights: Tensor, outputs: Tensor) -> Tensor:
    """Weighted sum over slots: [T, K], [T, K, H] -> [T, H] float32."""
    return torch.bmm(weights.float()[:, None], outputs)[:, 0]


def _observed_experts(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    output: Tensor = experts.observer.observe(hidden, ids, weights)
    return output


ALL_EXPERTS_FUNCTIONS.register(OBSERVE, _observed_experts)
