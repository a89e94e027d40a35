"""Attention: grouped queries with what families add to it, and DeepSeek's with latent keys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edge_moe.converters.onnx.layouts import Layout
from edge_moe.converters.onnx.mixer import Mixer
from edge_moe.converters.onnx.operations import Heads, Operations
from edge_moe.converters.onnx.rope import NO_ROTARY, Rotary, read_rotary
from edge_moe.converters.onnx.states import State, keys_and_values
from edge_moe.converters.onnx.weights import Weights
from edge_moe.errors import TargetError
from edge_moe.spec import ModelSpec

_HEAD_UNIT = 16
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

    def is_in(self, weights: Weights) -> bool:
        """Whether the layer has attention."""
        return f"{self.prefix}.{self.layout.attention_output}.weight" in weights.tensors

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
        query, key, value = parts
        mixed = operations.attention(query, key, value, self.layer, self.heads)
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
        query, key, value = (
            operations.reshape(part, 0, 0, count * width) for part in (query, key, value)
        )
        mixed = operations.attention(query, key, value, self.layer, self.heads)
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
    spec: ModelSpec, config: Any, heads: Heads, layout: Layout, layer: int, prefix: str
) -> Attention:
    """That of layer number `layer`, whose tensors start with `prefix`."""
    kind = LatentAttention if spec.expanded_kv_width else Attention
    return kind(config, layer, prefix, heads, layout)


def read_heads(spec: ModelSpec, config: Any, layout: Layout) -> tuple[Heads, Rotary]:
    """The shape of attention in every layer.

    Raises:
        TargetError: the graph cannot compute it.
    """
    is_latent = spec.expanded_kv_width > 0
    width = spec.query_width // spec.num_attention_heads
    rotated = config.qk_rope_head_dim if is_latent else width
    rotary = read_rotary(config, rotated) if layout.is_rotary else NO_ROTARY
    _check(spec, config, rotary.width)
    heads = Heads(
        num_query=spec.num_attention_heads,
        num_kv=spec.num_kv_heads,
        width=width,
        rotary_width=rotary.width,
        is_interleaved=is_latent and getattr(config, "rope_interleave", True),
        scale=_scale(config, width),
    )
    return heads, rotary


def _check(spec: ModelSpec, config: Any, rotary_width: int) -> None:
    """Refuse what the graph cannot compute.

    Raises:
        TargetError: attention to a window of the text, or heads of an odd width.
    """
    width = spec.query_width // spec.num_attention_heads
    if width % _HEAD_UNIT or rotary_width % _HEAD_UNIT:
        raise TargetError(
            f"target onnx: heads are {width} wide and {rotary_width} of it rotates, onnxruntime's "
            f"attention needs multiples of {_HEAD_UNIT}: use --target native"
        )
    window = getattr(config, "sliding_window", None)
    is_used = getattr(config, "use_sliding_window", True)
    if window and is_used and window < spec.max_position_embeddings:
        raise TargetError(
            f"target onnx: the checkpoint attends to a window of {window} of its "
            f"{spec.max_position_embeddings} tokens, which the graph does not do: use --target "
            "native"
        )


def _scale(config: Any, width: int) -> float:
    """1 / sqrt(width); YaRN with mscale_all_dim raises it (arXiv:2309.00071, section 3.4)."""
    scale, parameters = float(width**-0.5), getattr(config, "rope_parameters", None) or {}
    all_dim = parameters.get("mscale_all_dim", 0)
    if parameters.get("rope_type", "default") == "default" or not all_dim:
        return scale
    factor = parameters["factor"]
    stretch = 0.1 * all_dim * math.log(factor) + 1.0 if factor > 1 else 1.0
    return scale * stretch * stretch
