"""Gemma 4: heads of two widths, and a dense MLP beside the experts, with a norm after each."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_moe.converters.onnx.attention import Attention
from edge_moe.converters.onnx.feed_forward import FeedForward
from edge_moe.converters.onnx.mixer import Mixer
from edge_moe.converters.onnx.operations import Operations
from edge_moe.converters.onnx.weights import Weights


class GemmaAttention(Attention):
    """Values are normed, and are the keys where there is no v_proj."""

    def mix(self, operations: Operations, weights: Weights, inputs: str) -> str:
        prefix, heads = self.prefix, self.heads
        query, key = (
            weights.linear(operations, f"{prefix}.{name}_proj", inputs) for name in ("q", "k")
        )
        value = key
        if f"{prefix}.v_proj.weight" in weights.tensors:
            value = weights.linear(operations, f"{prefix}.v_proj", inputs)
        query = self._query_norm(operations, weights, query, f"{prefix}.q_norm", heads.num_query)
        key = self._query_norm(operations, weights, key, f"{prefix}.k_norm", heads.num_kv)
        by_head = operations.reshape(value, 0, 0, heads.num_kv, heads.width)
        value = operations.unit_norm(by_head, self.config.rms_norm_eps, of_sum=False)
        value = operations.reshape(value, 0, 0, heads.num_kv * heads.width)
        mixed = operations.attention((query, key, value), self.layer, heads)
        return weights.linear(operations, f"{prefix}.o_proj", mixed)


class GemmaLayer:
    """One layer, whose tensors start with `prefix`."""

    def __init__(
        self, config: Any, weights: Weights, mixer: Mixer, feed_forward: FeedForward, prefix: str
    ) -> None:
        self._config = config
        self._weights = weights
        self._mixer = mixer
        self._feed_forward = feed_forward
        self._prefix = prefix

    def add(self, operations: Operations, stream: str) -> str:
        """[b, s, H] -> [b, s, H]"""
        op, weights = operations.graph.op, self._weights
        mixed = self._mixer.mix(operations, weights, self._norm(operations, "input", stream))
        stream = op("Add", [stream, self._norm(operations, "post_attention", mixed)])
        output = op("Add", [self._mlp(operations, stream), self._experts(operations, stream)])
        stream = op("Add", [stream, self._norm(operations, "post_feedforward", output)])
        scalar = weights.tensor(f"{self._prefix}.layer_scalar")
        return op("Mul", [stream, operations.graph.weight(scalar)])

    def _mlp(self, operations: Operations, stream: str) -> str:
        inputs = self._norm(operations, "pre_feedforward", stream)
        output = self._feed_forward.mlp(operations, f"{self._prefix}.mlp", inputs)
        return self._norm(operations, "post_feedforward", output, "_1")

    def _experts(self, operations: Operations, stream: str) -> str:
        inputs = self._norm(operations, "pre_feedforward", stream, "_2")
        layer_id, routed_by = self._mixer.layer, self._routed_by(operations, stream)
        output = self._feed_forward.experts(operations, layer_id, routed_by, inputs)
        return self._norm(operations, "post_feedforward", output, "_2")

    def _routed_by(self, operations: Operations, stream: str) -> str:
        """What the router's matrix multiplies: a norm of its own, over the root of its width."""
        config = self._config
        scale = self._weights.tensor(f"{self._prefix}.router.scale")
        normed = operations.rms_norm(stream, scale, config.rms_norm_eps)
        root = operations.graph.constant(config.hidden_size**-0.5, np.float32)
        return operations.graph.op("Mul", [normed, root])

    def _norm(self, operations: Operations, place: str, value: str, number: str = "") -> str:
        return self._weights.norm(operations, f"{self._prefix}.{place}_layernorm{number}", value)
