"""The work on one decoder layer: run its attention, split its FFN, refit what is left.

Letters as in `split`; B windows of W tokens, T = B W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from smollm2.fit import NormalEquations, router_rows
from smollm2.split import DenseFfn, NeuronSplit, split_neurons

_EVERY_TOKEN = 3
"""Neurons are clustered on every third token."""


class DenseLayer:
    """One decoder layer of a Llama; `load` puts another layer's weights in the same memory."""

    def __init__(self, config: LlamaConfig, window_tokens: int) -> None:
        config._attn_implementation = "sdpa"
        self._layer = LlamaDecoderLayer(config, layer_idx=0)
        positions = torch.arange(window_tokens)[None]
        self._rotation = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)

    def load(self, tensors: dict[str, Tensor]) -> DenseFfn:
        """Take the weights of a layer; its FFN is returned."""
        self._layer.load_state_dict(tensors)
        mlp = self._layer.mlp
        return DenseFfn(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)

    def attend(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(residual [B, W, H] after attention, inputs of the FFN [T, H]); windows run alone."""
        residual = torch.empty_like(hidden)
        inputs = torch.empty_like(hidden)
        for index, window in enumerate(hidden[:, None]):
            normed = self._layer.input_layernorm(window)
            attended = self._layer.self_attn(
                normed, position_embeddings=self._rotation, attention_mask=None
            )[0]
            residual[index] = (window + attended)[0]
            inputs[index] = self._layer.post_attention_layernorm(residual[index])
        return residual, inputs.flatten(0, 1)


@dataclass(frozen=True)
class SplitLayer:
    """Where the neurons of a layer went, and the router that chooses among the experts."""

    split: NeuronSplit
    router: Tensor
    """[E, H], exact in bfloat16"""
    recall: float
    """Share of the top_k experts of most energy that the router finds, on the calibration text."""


def split_layer(
    ffn: DenseFfn,
    inputs: Tensor,
    activations: Tensor,
    *,
    num_experts: int,
    expert_width: int,
    top_k: int,
    ridge: float,
    spread: float,
    generator: torch.Generator,
) -> SplitLayer:
    """Cluster the neurons and fit the router; `inputs` [T, H] give the `activations` [T, F]."""
    strengths = ffn.strengths(activations)
    num_shared = strengths.shape[1] - num_experts * expert_width
    split = split_neurons(strengths[::_EVERY_TOKEN], num_shared, num_experts, generator)
    energy = split.energy(strengths)
    equations = NormalEquations.zeros(inputs.shape[1], num_experts)
    equations.add(inputs, energy)
    router = router_rows(equations, ridge, spread).bfloat16().float()
    found = choose(router, inputs, top_k)
    is_best = torch.zeros_like(energy).scatter_(1, energy.topk(top_k, dim=1).indices, 1.0)
    return SplitLayer(split, router, recall=float(is_best.gather(1, found).mean()))


def choose(router: Tensor, inputs: Tensor, top_k: int) -> Tensor:
    """The experts of each token, [T, K]."""
    return (inputs @ router.T).topk(top_k, dim=1).indices


@dataclass(frozen=True)
class Refit:
    """down_proj of the whole layer, in the dense order, and what it does."""

    down: Tensor
    """[H, F]"""
    outputs: Tensor
    """What the layer's experts add to the residual, [T, H]"""
    error_before: float
    """||dense FFN - experts||^2 / ||dense FFN||^2 with the dense down_proj, same inputs"""
    error_after: float


def refit_down(
    ffn: DenseFfn, layer: SplitLayer, inputs: Tensor, top_k: int, ridge: float | None
) -> Refit:
    """Choose down_proj so that the chosen experts come nearest to the dense FFN on `inputs` [T, H].

    Without a `ridge`, down_proj stays what it was.
    """
    activations = ffn.activations(inputs)
    wanted = activations @ ffn.down.T
    activations *= layer.split.mask(choose(layer.router, inputs, top_k))
    outputs = activations @ ffn.down.T
    error_before = _relative_error(outputs, wanted)
    if ridge is None:
        return Refit(ffn.down, outputs, error_before, error_before)
    equations = NormalEquations.zeros(activations.shape[1], wanted.shape[1])
    equations.add(activations, wanted)
    down = equations.solve(ridge, toward=ffn.down)
    outputs = activations @ down.T
    return Refit(down, outputs, error_before, _relative_error(outputs, wanted))


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())
