"""The work on one decoder layer: run its attention, split its FFN, refit what is left.

Letters as in `split`; B windows of W tokens, T = B W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from edge_moe.converters.upcycle.split_layer import SplitLayer, choose
from edge_moe.converters.upcycle.split_neurons import DenseFfn, NeuronSplit
from edge_moe.converters.upcycle.split_router import NormalEquations


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
class Refit:
    """down_proj of the whole layer, in the dense order, and what it does."""

    down: Tensor
    """[H, F]"""
    outputs: Tensor
    """What the layer's experts add to the residual, [T, H]"""
    error_before: float
    """||dense FFN - experts||^2 / ||dense FFN||^2 with the dense down_proj, same inputs"""
    error_after: float


def running(split: NeuronSplit, chosen: Tensor) -> Tensor:
    """Which neurons run, [T, F] of 0 and 1, when `chosen` [T, K] experts do."""
    on = torch.ones(len(chosen), split.shared.numel() + split.experts.numel())
    is_chosen = torch.zeros(len(chosen), len(split.experts)).scatter_(1, chosen, 1.0)
    on[:, split.experts.flatten()] = is_chosen.repeat_interleave(split.experts.shape[1], dim=1)
    return on


def refit_down(
    ffn: DenseFfn, layer: SplitLayer, inputs: Tensor, top_k: int, ridge: float | None
) -> Refit:
    """Choose down_proj so that the chosen experts come nearest to the dense FFN on `inputs` [T, H].

    Without a `ridge`, down_proj stays what it was; else it is drawn towards that. This is the
    least-squares compensation known from pruning (SparseGPT, arXiv 2301.00774): the neurons that
    run make up for the experts that a token does not use.
    """
    activations = ffn.activations(inputs)
    wanted = activations @ ffn.down.T
    activations *= running(layer.split, choose(layer.router, inputs, top_k))
    outputs = activations @ ffn.down.T
    error_before = _relative_error(outputs, wanted)
    if ridge is None:
        return Refit(ffn.down, outputs, error_before, error_before)
    equations = NormalEquations.zeros(activations.shape[1], wanted.shape[1])
    equations.add(activations, wanted - outputs)  # what is missing
    down = ffn.down + equations.solve(ridge)
    outputs = activations @ down.T
    return Refit(down, outputs, error_before, _relative_error(outputs, wanted))


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())
