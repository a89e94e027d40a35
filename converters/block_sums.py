"""From what a MoE block did on one window to the sums that statistics are made of.

The one home of this arithmetic, whoever ran the block: transformers (`observe`) or llama.cpp.
Letters: T tokens, H hidden_size, E experts, k top_k, K = k + 1 slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from edge_moe.converters.rerouting import Slots, weight_changes
from edge_moe.spec import ModelSpec
from edge_moe.stats import ExpertStats

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
class ChosenExperts:
    """What the experts of each token did, [T, k] each; their outputs are not kept."""

    inputs: Tensor
    """[T, H] what the block was given."""
    expert_ids: Tensor
    """int64"""
    gates: Tensor
    """float64 real weights"""
    norms: Tensor
    """float64 |f|"""
    largest: Tensor
    """float32 largest |element| of f"""
    drop_losses: Tensor
    """float64 |change of the MoE output|**2 when the router has to do without the expert"""


@dataclass(frozen=True)
class TokenRecords:
    """Everything that is summed over tokens, before it is."""

    chosen: ChosenExperts
    logits: Tensor
    """[T, E] float32 of the router."""
    shifts: Tensor
    """[T] float64, see `residual_shift`."""
    moe_squares: Tensor
    """[T] float64 |output of the MoE block|**2, shared experts included."""
    residual_squares: Tensor
    """[T] float64 |hidden state after the layer|**2."""


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


def chosen_experts(inputs: Tensor, slots: Slots, outputs: Tensor, spec: ModelSpec) -> ChosenExperts:
    """What to keep of every slot's un-gated output [T, K, H]."""
    top_k = slots.top_k
    chosen = outputs[:, :top_k]
    return ChosenExperts(
        inputs=inputs,
        expert_ids=slots.expert_ids[:, :top_k],
        gates=slots.gates[:, :top_k],
        norms=chosen.double().norm(dim=2),
        largest=chosen.abs().amax(dim=2),
        drop_losses=_drop_losses(slots, outputs, spec),
    )


def token_records(
    chosen: ChosenExperts, logits: Tensor, moe_output: Tensor, layer_output: Tensor
) -> TokenRecords:
    """`moe_output` and `layer_output`, the hidden state after the layer, are [T, H]."""
    moe, layer = moe_output.double(), layer_output.double()
    return TokenRecords(
        chosen=chosen,
        logits=logits,
        shifts=residual_shift(layer, moe),
        moe_squares=moe.square().sum(dim=1),
        residual_squares=layer.square().sum(dim=1),
    )


def summarise(records: TokenRecords, spec: ModelSpec) -> WindowObservation:
    """The sums over the tokens of one window."""
    chosen = records.chosen
    ids, gates, norms = chosen.expert_ids, chosen.gates, chosen.norms
    logits = records.logits.double()
    chosen_scores = router_scores(logits, spec.router.score_function).gather(1, ids)
    is_top = gates == gates.amax(dim=1, keepdim=True)
    top_logit, top_id = logits.max(dim=1)

    def by_expert(values: Tensor, expert_ids: Tensor = ids) -> FloatArray64:
        flat = expert_ids.flatten().numpy()
        sums = np.bincount(flat, weights=values.flatten().numpy(), minlength=spec.num_experts)
        return sums.astype(np.float64)

    max_output = np.zeros(spec.num_experts)
    np.maximum.at(max_output, ids.flatten().numpy(), chosen.largest.flatten().numpy())
    return WindowObservation(
        routed_tokens=np.bincount(ids.flatten().numpy(), minlength=spec.num_experts),
        max_output=max_output,
        expert_sums={
            "gate": by_expert(gates),
            "output_norm": by_expert(norms),
            "output_square": by_expert(norms.square()),
            "gated_norm": by_expert(gates * norms),
            "gated_output_square": by_expert(gates * norms.square()),
            "gated_square": by_expert((gates * norms).square()),
            "shifted_norm": by_expert(records.shifts[:, None] * gates * norms),
            "router_score": by_expert(chosen_scores),
            "top_score": by_expert(chosen_scores * is_top),
            "top_logit": by_expert(top_logit, top_id),
        },
        drop_loss=by_expert(chosen.drop_losses),
        moe_square=float(records.moe_squares.sum()),
        residual_square=float(records.residual_squares.sum()),
        inputs=chosen.inputs,
        expert_ids=ids,
        gates=gates,
    )


def add_window(
    stats: ExpertStats, observation: WindowObservation, form_losses: FloatArray64
) -> None:
    """Add one window to the statistics of one layer; `form_losses` is [E, F]."""
    stats.routed_tokens[0] += observation.routed_tokens
    np.maximum(stats.max_output[0], observation.max_output, out=stats.max_output[0])
    for name, values in observation.expert_sums.items():
        stats.expert_sums[name].add(values, index=0)
    stats.layer_sums["moe_square"].add(observation.moe_square, index=0)
    stats.layer_sums["residual_square"].add(observation.residual_square, index=0)
    stats.form_loss.add(form_losses, index=0)


def router_scores(logits: Tensor, score_function: str) -> Tensor:
    """[T, E] raw logits -> the scores that the router chooses and weighs by."""
    return logits.sigmoid() if score_function == "sigmoid" else logits.softmax(dim=-1)


def residual_shift(layer_output: Tensor, moe_output: Tensor) -> Tensor:
    """[T] 1 - cos(h, h + m), where h + m [T, H] leaves the layer and m is what the MoE block adds.

    The token weight of EASY-EP (arXiv 2504.06792).
    """
    before = layer_output - moe_output
    return 1 - F.cosine_similarity(before, layer_output, dim=1, eps=1e-30)


def mix(weights: Tensor, outputs: Tensor) -> Tensor:
    """Weighted sum over slots: [T, K], [T, K, H] -> [T, H] float32."""
    return torch.bmm(weights.float()[:, None], outputs)[:, 0]


def _drop_losses(slots: Slots, outputs: Tensor, spec: ModelSpec) -> Tensor:
    """[T, k] float64 |change of the MoE output|**2 when each chosen expert is dropped."""
    changes = weight_changes(slots, spec.router)
    columns = [
        mix(changes[:, slot], outputs).double().square().sum(dim=1) for slot in range(slots.top_k)
    ]
    return torch.stack(columns, dim=1)
