"""Attention: grouped queries with what families add to it, and DeepSeek's with latent keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_moe.converters.onnx.heads import read_heads
from edge_moe.converters.onnx.layouts import Layout
from edge_moe.converters.onnx.mixer import Mixer
from edge_moe.converters.onnx.operations import Heads, Operations
from edge_moe.converters.onnx.states import State, keys_and_values
from edge_moe.converters.onnx.weights import Weights
from edge_moe.spec import ModelSpec

_LATENT_EPSILON = 1e-6  # of the norms inside latent attention, whatever rms_norm_eps says


class Attention(Mixer):
    """Grouped queries, with a cache of keys and values."""

    def __init__(self, config: Any, layer: int, prefix: str, heads: Heads, layout: Layout) -> None:
        """`prefix` is the layer's: `layout` says where in it attention lies."""
        super().__init__(config, layer, f"{prefix}.{layout.attention}")
        self.heads = heads
        self.layout = layout

    @property
    def states(self) -> tuple[State, ...]:
        return keys_and_values(self.layer, self.heads.num_kv, self.heads.width)

    def mix(self, operations: Operations, weights: Weights, inputs: str) -> str:
        """Query, key and value projections, with the norms that the checkpoint has."""
        layout, op, prefix = self.layout, operations.graph.op, self.prefix
        names = dict(zip("qk", layout.attention_norms, strict=True))
        parts, gate = [], ""
        for name, count in (("q", self.heads.num_query), ("k", self.heads.num_kv), ("v", 0)):
            value = weights.linear(operations, f"{prefix}.{name}_proj", inputs)
            if name == "q" and layout.has_gated_attention:
                value, gate = self._without_gate(operations, value)
            norm = f"{prefix}.{names.get(name)}"
            if f"{norm}.weight" in weights.tensors:
                value = self._query_norm(operations, weights, value, norm, count)
            parts.append(self._clipped(operations, value))
        sinks = weights.optional(f"{prefix}.sinks")
        mixed = operations.attention(parts, self.layer, self.heads, sinks)
        if gate:
            mixed = op("Mul", [mixed, op("Sigmoid", [gate])])
        return weights.linear(operations, f"{prefix}.{layout.attention_output}", mixed)

    def _without_gate(self, operations: Operations, value: str) -> tuple[str, str]:
        """Queries and the gates of what attention gives, which every head has side by side."""
        count, width = self.heads.num_query, self.heads.width
        pairs = operations.reshape(value, 0, 0, count, 2 * width)
        query, gate = (
            operations.reshape(part, 0, 0, count * width)
            for part in operations.split(pairs, (width, width))
        )
        return query, gate

    def _query_norm(
        self, operations: Operations, weights: Weights, value: str, name: str, count: int
    ) -> str:
        """One norm for every head, or one over all of them: the width of its weight tells."""
        if weights.tensors[f"{name}.weight"].shape[0] != self.heads.width:
            return weights.norm(operations, name, value)
        by_head = operations.reshape(value, 0, 0, count, self.heads.width)
        normed = weights.norm(operations, name, by_head)
        return operations.reshape(normed, 0, 0, count * self.heads.width)

    def _clipped(self, operations: Operations, value: str) -> str:
        """OLMoE may limit queries, keys and values."""
        limit = getattr(self.config, "clip_qkv", None)
        if limit is None:
            return value
        constant = operations.graph.constant
        low, high = constant(-limit, np.float32), constant(limit, np.float32)
        return operations.graph.op("Clip", [value, low, high])


class LatentAttention(Attention):
    """DeepSeek's attention as an ordinary one, its cache expanded (arXiv:2412.19437, 2.1.1).

    Heads are turned into [rotary part | rest]; values are as wide as keys, padded with zeros.
    """

    def mix(self, operations: Operations, weights: Weights, inputs: str) -> str:
        config, op, constant = self.config, operations.graph.op, operations.graph.constant
        prefix = self.prefix
        count, width, rotary = self.heads.num_query, self.heads.width, self.heads.rotary_width
        plain, value_width = width - rotary, config.v_head_dim
        query = self._query(operations, weights, inputs)
        rest, turned = operations.split(
            operations.reshape(query, 0, 0, count, width), (plain, rotary)
        )
        query = op("Concat", [turned, rest], axis=-1)
        latent = weights.linear(operations, f"{prefix}.kv_a_proj_with_mqa", inputs)
        latent, turned = operations.split(latent, (config.kv_lora_rank, rotary))
        norm = weights.weight(f"{prefix}.kv_a_layernorm")
        latent = operations.rms_norm(latent, norm, _LATENT_EPSILON)
        expanded = weights.linear(operations, f"{prefix}.kv_b_proj", latent)
        expanded = operations.reshape(expanded, 0, 0, count, plain + value_width)
        rest, value = operations.split(expanded, (plain, value_width))
        turned = op(
            "Tile",
            [operations.reshape(turned, 0, 0, 1, rotary), constant([1, 1, count, 1])],
        )
        key = op("Concat", [turned, rest], axis=-1)
        padding = constant([0, 0, 0, 0, 0, 0, 0, width - value_width])
        value = op("Pad", [value, padding, constant(0.0, np.float32)])
        parts = [operations.reshape(part, 0, 0, count * width) for part in (query, key, value)]
        mixed = operations.attention(parts, self.layer, self.heads)
        mixed, _ = operations.split(
            operations.reshape(mixed, 0, 0, count, width), (value_width, width - value_width)
        )
        mixed = operations.reshape(mixed, 0, 0, count * value_width)
        return weights.linear(operations, f"{prefix}.o_proj", mixed)

    def _query(self, operations: Operations, weights: Weights, inputs: str) -> str:
        prefix = self.prefix
        if f"{prefix}.q_proj.weight" in weights.tensors:
            return weights.linear(operations, f"{prefix}.q_proj", inputs)
        latent = weights.linear(operations, f"{prefix}.q_a_proj", inputs)
        norm = weights.weight(f"{prefix}.q_a_layernorm")
        latent = operations.rms_norm(latent, norm, _LATENT_EPSILON)
        return weights.linear(operations, f"{prefix}.q_b_proj", latent)


def attention(
    spec: ModelSpec,
    config: Any,
    layout: Layout,
    weights: Weights,
    layer: int,
    prefix: str,
    kind: type[Attention] | None = None,
) -> Attention | None:
    """That of layer number `layer`, whose tensors start with `prefix`; None where it has none.

    `kind` is a family's own.

    Raises:
        TargetError: the graph cannot compute it.
    """
    if f"{prefix}.{layout.attention}.{layout.attention_output}.weight" not in weights.tensors:
        return None
    kind = kind or (LatentAttention if spec.expanded_kv_width else Attention)
    heads = read_heads(spec, config, layout, weights, layer)
    return kind(config, layer, prefix, heads, layout)
