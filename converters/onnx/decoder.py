"""The decoder of every family that target onnx knows, layer by layer.

What a layer holds is told by the checkpoint's tensors: biases, norms of queries and keys, shared
experts. A checkpoint whose dense tensors are not all used is refused, so that nothing is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.onnx.attention import attention
from edge_moe.converters.onnx.data_files import DenseFile, ExpertFile
from edge_moe.converters.onnx.feed_forward import FeedForward
from edge_moe.converters.onnx.gemma import GemmaAttention, GemmaLayer
from edge_moe.converters.onnx.graph import Graph
from edge_moe.converters.onnx.head import add_logits, head_graph
from edge_moe.converters.onnx.layouts import Layout, layout_of
from edge_moe.converters.onnx.mixer import Mixer
from edge_moe.converters.onnx.operations import (
    ContribOperations,
    Operations,
    StandardOperations,
)
from edge_moe.converters.onnx.recurrent import recurrent_layer
from edge_moe.converters.onnx.states import (
    State,
    declare_inputs,
    declare_outputs,
)
from edge_moe.converters.onnx.weights import Weights


@dataclass
class Decoder:
    """Builds one graph over the layout of `dense` and `experts`."""

    kept: dict[int, list[int]]
    """Ids of the experts that stay, by MoE layer."""
    checkpoint: Checkpoint
    config: Any
    """transformers' configuration of the checkpoint."""
    dense: DenseFile
    experts: dict[int, ExpertFile]
    """By layer id."""
    is_exact: bool

    def __post_init__(self) -> None:
        spec = self.checkpoint.spec
        self._layout = layout = layout_of(spec.model_type)
        epsilon = getattr(self.config, layout.epsilon_key)
        self._weights = Weights(self.checkpoint, self.dense, epsilon, layout.adds_one)
        self._prefixes = [
            spec.layer_prefix(layer).removesuffix(".") for layer in range(spec.num_layers)
        ]
        mixers = [self._mixer(layout, layer_id) for layer_id in range(spec.num_layers)]
        self._mixers = {mixer.layer: mixer for mixer in mixers if mixer is not None}
        self._feed_forward = FeedForward(
            *(self.checkpoint, self.config, layout, self._weights, self.experts, self.kept),
            is_exact=self.is_exact,
        )

    @property
    def states(self) -> list[State]:
        """What the layers keep from one run to the next."""
        return [state for mixer in self._mixers.values() for state in mixer.states]

    def graph(self, *, is_standard: bool) -> Graph:
        """The whole decoder; every weight has its place in the files afterwards.

        Logits are those of the last position, and of all in standard operations: a prompt's would
        take vocabulary x tokens x 4 bytes.

        Raises:
            TargetError: the checkpoint holds tensors that the graph has no place for.
        """
        spec, graph = self.checkpoint.spec, Graph(is_standard=is_standard)
        graph.input("input_ids", "INT64", ["batch", "new_tokens"])
        graph.input("attention_mask", "INT64", ["batch", "all_tokens"])
        declare_inputs(graph, self.states)
        kind = StandardOperations if is_standard else ContribOperations
        operations = kind(graph)
        embedding = self._weights.tensor(spec.embedding_name)
        stream = graph.op("Gather", [graph.weight(embedding), "input_ids"])
        stream = self._scaled(operations, stream, self._embedding_factor)
        for layer_id in range(spec.num_layers):
            stream = self._layer(operations, layer_id, stream)
        final_norm = spec.final_norm_name.removesuffix(".weight")
        stream = self._weights.norm(operations, final_norm, stream)
        if not is_standard:
            graph.op("Identity", [stream], name="hidden_states")
            stream = graph.op("Gather", [stream, graph.constant([-1])], axis=1)  # [b, 1, H]
        add_logits(graph, self._weights, spec, stream)
        self._declare_outputs(graph)
        self._weights.require_all_used()
        return graph

    def head_graph(self) -> Graph:
        """Hidden states of any positions -> their logits."""
        return head_graph(self._weights, self.checkpoint.spec)

    def _mixer(self, layout: Layout, layer_id: int) -> Mixer | None:
        """None where the layer does not look back."""
        prefix, tensors = self._prefixes[layer_id], self._weights.tensors
        recurrent = recurrent_layer(tensors, self.config, layer_id, prefix)
        if recurrent is not None:
            return recurrent
        spec = self.checkpoint.spec
        kind = GemmaAttention if spec.family.has_global_heads else None
        return attention(spec, self.config, layout, self._weights, layer_id, prefix, kind)

    def _layer(self, operations: Operations, layer_id: int, stream: str) -> str:
        """A block that looks back and one that does not, or a single one of them."""
        if self.checkpoint.spec.family.has_global_heads:
            mixer, prefix = self._mixers[layer_id], self._prefixes[layer_id]
            layer = GemmaLayer(self.config, self._weights, mixer, self._feed_forward, prefix)
            return layer.add(operations, stream)
        op, norms = operations.graph.op, self.checkpoint.spec.family.layer_norms
        blocks = [self._look_back, self._look_at_itself]
        if len(norms) == 1:
            blocks = blocks[:1] if layer_id in self._mixers else blocks[1:]
        for norm, block in zip(norms, blocks, strict=True):
            module = f"{self._prefixes[layer_id]}.{norm}"
            inputs = self._weights.norm(operations, module, stream)
            output = block(operations, layer_id, inputs)
            factor = getattr(self.config, "residual_multiplier", 1.0)  # Granite's
            output = self._scaled(operations, output, factor)
            stream = op("Add", [stream, output])
        return stream

    @property
    def _embedding_factor(self) -> float:
        if self._layout.scales_embedding:
            return math.sqrt(self.checkpoint.spec.hidden_size)
        return float(getattr(self.config, "embedding_multiplier", 1.0))

    def _scaled(self, operations: Operations, value: str, factor: float) -> str:
        if factor == 1.0:
            return value
        return operations.graph.op("Mul", [value, operations.graph.constant(factor, np.float32)])

    def _look_back(self, operations: Operations, layer_id: int, inputs: str) -> str:
        return self._mixers[layer_id].mix(operations, self._weights, inputs)

    def _look_at_itself(self, operations: Operations, layer_id: int, inputs: str) -> str:
        return self._feed_forward.add(operations, layer_id, self._prefixes[layer_id], inputs)

    def _declare_outputs(self, graph: Graph) -> None:
        spec = self.checkpoint.spec
        if graph.is_standard:
            graph.output("logits", "FLOAT", ["batch", "new_tokens", spec.vocab_size])
        else:
            graph.output("logits", "FLOAT", ["batch", 1, spec.vocab_size])
            graph.output("hidden_states", "FLOAT", ["batch", "new_tokens", spec.hidden_size])
        declare_outputs(graph, self.states)
