"""Watching a MoE block at work: the routing it really used, and what each expert contributed.

The block is transformers' own. An experts implementation, registered under `OBSERVE`, is called
with the hidden states, the chosen ids and their weights, so no router is ever written again here.
Letters: T tokens of one window, H hidden_size, E experts, k top_k, K = k + 1 slots.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from edge_moe.converters.block_sums import (
    ChosenExperts,
    WindowObservation,
    chosen_experts,
    mix,
    router_scores,
    summarise,
    token_records,
)
from edge_moe.converters.rerouting import Slots, fill_slots, sparsemixer_slots
from edge_moe.runtime.moe_block import MoeBlock, expert_output
from edge_moe.spec import ModelSpec

OBSERVE = "edge_moe_observe"
"""Name of the experts implementation."""


class BlockObserver:
    """Attach to one MoE block; after each forward pass of one window, `take()` the observation."""

    def __init__(self, block: MoeBlock, spec: ModelSpec) -> None:
        self._block = block
        self._experts = block.experts
        self._spec = spec
        router = spec.router
        eligible = router.top_groups * (spec.num_experts // router.num_groups)
        self._has_next_best = spec.top_k < eligible
        self._is_probing = False
        self._seen: ChosenExperts | None = None
        self._logits: Tensor | None = None
        self._moe_output: Tensor | None = None
        self._router_arguments: tuple[Any, ...] = ()
        self._hooks = [
            block.output_module.register_forward_hook(self._after_block),
            block.router.register_forward_hook(self._after_router),
        ]
        if block.logits_module is not None:
            self._hooks.append(block.logits_module.register_forward_hook(self._after_logits))
        self._experts.observer = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        del self._experts.observer

    def take(self, layer_output: Tensor) -> WindowObservation:
        """The observation of the last forward pass, which gave `layer_output` [1, T, H]."""
        seen, moe_output, logits = self._seen, self._moe_output, self._logits
        self._seen = self._moe_output = self._logits = None
        if seen is None or moe_output is None or logits is None:
            raise RuntimeError("the MoE block was not run through the experts interface")
        records = token_records(seen, logits, moe_output, layer_output.flatten(0, 1))
        return summarise(records, self._spec)

    def observe(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The experts' forward pass, [T, H], [T, k], [T, k] -> [T, H]."""
        slots = self._slots(ids, weights)
        outputs = self._slot_outputs(hidden, slots.expert_ids)
        self._record(hidden, slots, outputs)
        return mix(slots.gates, outputs)

    def _record(self, hidden: Tensor, slots: Slots, outputs: Tensor) -> None:
        """Keep what `take` will need."""
        self._seen = chosen_experts(hidden, slots, outputs, self._spec)

    def _slots(self, ids: Tensor, weights: Tensor) -> Slots:
        """The chosen experts and the next-best one, by the router's own choice of one more."""
        if self._spec.router.score_function == "sparsemixer":
            if self._logits is None:
                raise RuntimeError("the router did not run before the experts")
            return sparsemixer_slots(self._logits, ids, weights)
        wider = self._probe() if self._has_next_best else None
        slots = fill_slots((ids, weights), wider)
        scale = self._block.expert_scale
        return slots if scale is None else slots.scaled_by(scale)

    def _probe(self) -> tuple[Tensor, Tensor]:
        """(ids, weights), [T, k + 1] each: the router's own choice of one expert more."""
        self._is_probing = True
        try:
            return self._block.choose_more(self._router_arguments)
        finally:
            self._is_probing = False

    def _after_block(self, block: nn.Module, arguments: object, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        self._moe_output = hidden.flatten(0, -2)

    def _after_router(self, router: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if self._is_probing:
            return
        self._router_arguments = arguments
        if self._block.logits_module is None:
            self._logits = output[0]

    def _after_logits(self, module: nn.Module, arguments: object, output: Tensor) -> None:
        if not self._is_probing:
            self._logits = output

    def _slot_outputs(self, hidden: Tensor, expert_ids: Tensor) -> Tensor:
        """[T, K, H] un-gated output of every slot's expert; zero in an empty slot."""
        outputs = hidden.new_zeros(*expert_ids.shape, hidden.shape[1])
        for expert_id in np.unique(expert_ids.numpy()[expert_ids.numpy() >= 0]):
            token, slot = (expert_ids == expert_id).nonzero(as_tuple=True)
            gate_up, down = (
                self._experts.gate_up_proj[expert_id],
                self._experts.down_proj[expert_id],
            )
            outputs[token, slot] = expert_output(
                self._experts, hidden[token], gate_up, down, int(expert_id)
            )
        return outputs


def router_scores_of(block: MoeBlock, inputs: Tensor, spec: ModelSpec) -> Tensor:
    """[T, H] what a MoE block was given -> [T, E] its own router's scores, float32."""
    return router_scores(block.logits(inputs).double(), spec.router.score_function).float()


def _observed_experts(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    output: Tensor = experts.observer.observe(hidden, ids, weights)
    return output


ALL_EXPERTS_FUNCTIONS.register(OBSERVE, _observed_experts)
