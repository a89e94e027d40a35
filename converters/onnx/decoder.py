"""The decoder of every family that target onnx knows, layer by layer.

What a layer holds is told by the checkpoint's tensors: biases, norms of queries and keys, shared
experts. A checkpoint whose dense tensors are not all used is refused, so that nothing is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.onnx.attention import attention, read_heads
from edge_moe.converters.onnx.data_files import (
    DenseFile,
    ExpertFile,
    StoredTensor,
    array_chunks,
)
from edge_moe.converters.onnx.experts import ExpertLayer, contrib_experts
from edge_moe.converters.onnx.graph import MICROSOFT, Graph
from edge_moe.converters.onnx.layouts import layout_of
from edge_moe.converters.onnx.mixer import Mixer
from edge_moe.converters.onnx.operations import (
    ContribOperations,
    Operations,
    StandardOperations,
)
from edge_moe.converters.onnx.recurrent import recurrent_layer
from edge_moe.converters.onnx.rope import Rotary
from edge_moe.converters.onnx.routing import Routing
from edge_moe.converters.onnx.standard import standard_experts
from edge_moe.converters.onnx.states import (
    State,
    declare_inputs,
    declare_outputs,
)
from edge_moe.converters.onnx.weights import Weights
from edge_moe.plan import Plan


@dataclass
class Decoder:
    """Builds one graph over the layout of `dense` and `experts`."""

    plan: Plan
    checkpoint: Checkpoint
    config: Any
    """transformers' configuration of the checkpoint."""
    dense: DenseFile
    experts: dict[int, ExpertFile]
    """By layer id."""
    is_exact: bool

    def __post_init__(self) -> None:
        spec = self.checkpoint.spec
        self._kept = {
            layer_id: self.plan.kept(row)
            for layer_id, row in zip(self.plan.moe_layer_ids, self.plan.forms, strict=True)
        }
        self._layout = layout_of(spec.model_type)
        epsilon = getattr(self.config, self._layout.epsilon_key)
        self._weights = Weights(self.checkpoint, self.dense, epsilon, self._layout.adds_one)
        self.heads, self._rotary = read_heads(spec, self.config, self._layout)
        self._prefixes = [
            spec.layer_prefix(layer).removesuffix(".") for layer in range(spec.num_layers)
        ]
        mixers = [self._mixer(layer_id) for layer_id in range(spec.num_layers)]
        self._mixers = {mixer.layer: mixer for mixer in mixers if mixer is not None}

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
        operations = kind(graph, self._rotary_tables(self._rotary))
        embedding = self._weights.tensor(spec.embedding_name)
        stream = graph.op("Gather", [graph.weight(embedding), "input_ids"])
        for layer_id in range(spec.num_layers):
            stream = self._layer(operations, layer_id, stream)
        final_norm = spec.final_norm_name.removesuffix(".weight")
        stream = self._weights.norm(operations, final_norm, stream)
        if not is_standard:
            graph.op("Identity", [stream], name="hidden_states")
            stream = graph.op("Gather", [stream, graph.constant([-1])], axis=1)  # [b, 1, H]
        graph.op("Identity", [operations.linear(stream, self._head())], name="logits")
        self._declare_outputs(graph)
        self._weights.require_all_used()
        return graph

    def head_graph(self) -> Graph:
        """Hidden states of any positions -> their logits."""
        spec, graph = self.checkpoint.spec, Graph(is_standard=False)
        hidden = graph.input("hidden_states", "FLOAT", ["batch", "positions", spec.hidden_size])
        inputs = [hidden, graph.weight(self._head())]
        graph.ops("FusedMatMul", inputs, ["logits"], domain=MICROSOFT, transB=1)
        graph.output("logits", "FLOAT", ["batch", "positions", spec.vocab_size])
        return graph

    def _head(self) -> StoredTensor:
        spec = self.checkpoint.spec
        is_tied = spec.tie_word_embeddings
        return self._weights.tensor(spec.embedding_name if is_tied else "lm_head.weight")

    def _mixer(self, layer_id: int) -> Mixer | None:
        """None where the layer does not look back."""
        prefix, tensors = self._prefixes[layer_id], self._weights.tensors
        recurrent = recurrent_layer(tensors, self.config, layer_id, prefix)
        if recurrent is not None:
            return recurrent
        spec = self.checkpoint.spec
        found = attention(spec, self.config, self.heads, self._layout, layer_id, prefix)
        return found if found.is_in(self._weights) else None

    def _layer(self, operations: Operations, layer_id: int, stream: str) -> str:
        """A block that looks back and one that does not, or a single one of them."""
        op, norms = operations.graph.op, self.checkpoint.spec.family.layer_norms
        blocks = [self._look_back, self._feed_forward]
        if len(norms) == 1:
            blocks = blocks[:1] if layer_id in self._mixers else blocks[1:]
        for norm, block in zip(norms, blocks, strict=True):
            module = f"{self._prefixes[layer_id]}.{norm}"
            inputs = self._weights.norm(operations, module, stream)
            stream = op("Add", [stream, block(operations, layer_id, inputs)])
        return stream

    def _look_back(self, operations: Operations, layer_id: int, inputs: str) -> str:
        return self._mixers[layer_id].mix(operations, self._weights, inputs)

    def _feed_forward(self, operations: Operations, layer_id: int, inputs: str) -> str:
        if layer_id in self._kept:
            return self._mixture(operations, layer_id, inputs)
        return self._mlp(operations, f"{self._prefixes[layer_id]}.{self._layout.mlp}", inputs)

    def _mixture(self, operations: Operations, layer_id: int, inputs: str) -> str:
        """Routed experts, and the shared one where there is one."""
        spec, graph, kept = self.checkpoint.spec, operations.graph, self._kept[layer_id]
        router, *biases = spec.router_tensor_names(layer_id)
        weight = self._weights.rows(router, kept)
        logits = operations.reshape(operations.linear(inputs, weight), -1, len(kept))
        bias = graph.weight(self._weights.rows(biases[0], kept)) if biases else ""
        least_sum = self._layout.least_sum
        routing = Routing(spec.router, spec.top_k, spec.num_experts, tuple(kept), least_sum)
        stacks = tuple(self.experts[layer_id].stacks)
        prefix, hidden = spec.moe_prefix(layer_id), inputs
        if spec.latent_width:
            hidden = self._weights.linear(operations, f"{prefix}.fc1_latent_proj", inputs)
        layer = ExpertLayer(hidden, logits, bias, routing, stacks, has_gate=spec.has_gate)
        if graph.is_standard:
            output = standard_experts(operations, layer)
        else:
            output = contrib_experts(operations, layer, is_exact=self.is_exact)
        if spec.latent_width:
            output = self._weights.linear(operations, f"{prefix}.fc2_latent_proj", output)
        shared = self._shared_expert(operations, prefix, inputs)
        return graph.op("Add", [output, shared]) if shared else output

    def _shared_expert(self, operations: Operations, prefix: str, inputs: str) -> str:
        """The expert that every token goes through, gated where there is a gate; "" for none."""
        tensors, op = self.checkpoint.tensors, operations.graph.op
        for name in ("shared_expert", "shared_experts"):
            if f"{prefix}.{name}.{self._layout.projections[-1]}.weight" in tensors:
                output = self._mlp(operations, f"{prefix}.{name}", inputs)
                gate = f"{prefix}.{name}_gate"
                if f"{gate}.weight" not in tensors:
                    return output
                share = op("Sigmoid", [self._weights.linear(operations, gate, inputs)])
                return op("Mul", [output, share])
        return ""

    def _mlp(self, operations: Operations, prefix: str, inputs: str) -> str:
        *inner, down = self._layout.projections
        parts = [self._weights.linear(operations, f"{prefix}.{name}", inputs) for name in inner]
        if len(parts) == 1:
            hidden = operations.relu_squared(parts[0])
        else:
            hidden = operations.silu_gated(parts[0], parts[1])
        return self._weights.linear(operations, f"{prefix}.{down}", hidden)

    def _rotary_tables(self, rotary: Rotary) -> list[StoredTensor]:
        num_rows = self.checkpoint.spec.max_position_embeddings
        if not rotary.width:
            return []
        shape = (num_rows, rotary.width // 2)
        return [
            self.dense.add(name, shape, array_chunks(rotary.rows(function), num_rows))
            for name, function in (("rotary.cos", np.cos), ("rotary.sin", np.sin))
        ]

    def _declare_outputs(self, graph: Graph) -> None:
        spec = self.checkpoint.spec
        if graph.is_standard:
            graph.output("logits", "FLOAT", ["batch", "new_tokens", spec.vocab_size])
        else:
            graph.output("logits", "FLOAT", ["batch", 1, spec.vocab_size])
            graph.output("hidden_states", "FLOAT", ["batch", "new_tokens", spec.hidden_size])
        declare_outputs(graph, self.states)
