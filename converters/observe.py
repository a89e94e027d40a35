"""Watching a MoE block at work: the routing it really used, and what each expert contributed.

The block is transformers' own. An experts implementation, registered under `OBSERVE`, is called
with the hidden states, the chosen ids and their weights, so no router is ever written again here.
Letters: T tokens of one window, H hidden_size, E experts, k top_k, K = k + 1 slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from edge_moe.converters.rerouting import Slots, fill_slots, sparsemixer_slots, weight_changes
from edge_moe.runtime.moe_block import MoeBlock, expert_output
from edge_moe.spec import ModelSpec

OBSERVE = "edge_moe_observe"
"""Name of the experts implementation."""

FloatArray64 = npt.NDArray[np.float64]


class RoutedWindow(Protocol):
    """One window as a MoE block saw it; letters as above."""

    @property
    def inputs(self) -> Tensor:
        """[T, H] what the block was given."""

    @property
    def expert_ids(self) -> Tensor:
        """[T, k]"""

    @property
    def gates(self) -> Tensor:
        """[T, k] float64 real weights."""


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
    residual_square: float
    """|hidden state after the layer|**2."""
    inputs: Tensor
    """[T, H] what the block was given."""
    expert_ids: Tensor
    """[T, k]"""
    gates: Tensor
    """[T, k] float64 real weights."""


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
        self._seen: _Seen | None = None
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
        shift = residual_shift(layer_output.flatten(0, 1).double(), moe_output.double())
        return self._summarise(seen, logits, shift, moe_output, layer_output)

    def observe(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The experts' forward pass, [T, H], [T, k], [T, k] -> [T, H]."""
        slots = self._slots(ids, weights)
        outputs = self._slot_outputs(hidden, slots.expert_ids)
        self._record(hidden, slots, outputs)
        return mix(slots.gates, outputs)

    def _record(self, hidden: Tensor, slots: Slots, outputs: Tensor) -> None:
        """Keep what `take` will need."""
        chosen = outputs[:, : slots.top_k]
        self._seen = _Seen(
            inputs=hidden,
            expert_ids=slots.expert_ids[:, : slots.top_k],
            gates=slots.gates[:, : slots.top_k],
            norms=chosen.double().norm(dim=2),
            largest=chosen.abs().amax(dim=2),
            drop_losses=_drop_losses(slots, outputs, self._spec),
        )

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

    def _summarise(
        self, seen: _Seen, logits: Tensor, shift: Tensor, moe_output: Tensor, layer_output: Tensor
    ) -> WindowObservation:
        ids, gates, norms = seen.expert_ids, seen.gates, seen.norms
        num_experts = self._spec.num_experts
        scores = router_scores(logits.double(), self._spec.router.score_function)
        chosen_scores = scores.gather(1, ids)
        is_top = gates == gates.amax(dim=1, keepdim=True)
        top_logit, top_id = logits.double().max(dim=1)

        def by_expert(values: Tensor, expert_ids: Tensor = ids) -> FloatArray64:
            flat = expert_ids.flatten().numpy()
            sums = np.bincount(flat, weights=values.flatten().numpy(), minlength=num_experts)
            return sums.astype(np.float64)

        max_output = np.zeros(num_experts)
        np.maximum.at(max_output, ids.flatten().numpy(), seen.largest.flatten().numpy())
        return WindowObservation(
            routed_tokens=np.bincount(ids.flatten().numpy(), minlength=num_experts),
            max_output=max_output,
            expert_sums={
                "gate": by_expert(gates),
                "output_norm": by_expert(norms),
                "output_square": by_expert(norms.square()),
                "gated_norm": by_expert(gates * norms),
                "gated_output_square": by_expert(gates * norms.square()),
                "gated_square": by_expert((gates * norms).square()),
                "shifted_norm": by_expert(shift[:, None] * gates * norms),
                "router_score": by_expert(chosen_scores),
                "top_score": by_expert(chosen_scores * is_top),
                "top_logit": by_expert(top_logit, top_id),
            },
            drop_loss=by_expert(seen.drop_losses),
            moe_square=float(moe_output.double().square().sum()),
            residual_square=float(layer_output.double().square().sum()),
            inputs=seen.inputs,
            expert_ids=ids,
            gates=gates,
        )


@dataclass(frozen=True)
class _Seen:
    """What the experts' forward pass leaves behind until the layer is done; [T, k] each."""

    inputs: Tensor
    """[T, H]"""
    expert_ids: Tensor
    gates: Tensor
    norms: Tensor
    """|f|"""
    largest: Tensor
    """largest |element| of f"""
    drop_losses: Tensor


def router_scores(logits: Tensor, score_function: str) -> Tensor:
    """[T, E] raw logits -> the scores that the router chooses and weighs by."""
    return logits.sigmoid() if score_function == "sigmoid" else logits.softmax(dim=-1)


def router_scores_of(block: MoeBlock, inputs: Tensor, spec: ModelSpec) -> Tensor:
    """[T, H] what a MoE block was given -> [T, E] its own router's scores, float32."""
    return router_scores(block.logits(inputs).double(), spec.router.score_function).float()


def residual_shift(layer_output: Tensor, moe_output: Tensor) -> Tensor:
    """[T] 1 - cos(h, h + m), where h + m [T, H] leaves the layer and m is what the MoE block adds.

    The token weight of EASY-EP (arXiv 2504.06792).
    """
    before = layer_output - moe_output
    return 1 - F.cosine_similarity(before, layer_output, dim=1, eps=1e-30)


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
