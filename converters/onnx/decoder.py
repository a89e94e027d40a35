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
from edge_moe.converters.onnx.data_files import (
    DenseFile,
    ExpertFile,
    StoredTensor,
    array_chunks,
)
from edge_moe.converters.onnx.experts import ExpertLayer, contrib_experts
from edge_moe.converters.onnx.graph import MICROSOFT, Graph
from edge_moe.converters.onnx.layouts import layout_of
from edge_moe.converters.onnx.operations import (
    ContribOperations,
    Heads,
    Operations,
    StandardOperations,
)
from edge_moe.converters.onnx.recurrent import recurrent_layer
from edge_moe.converters.onnx.rope import NO_ROTARY, Rotary, read_rotary
from edge_moe.converters.onnx.routing import Routing
from edge_moe.converters.onnx.standard import standard_experts
from edge_moe.converters.onnx.states import (
    State,
    declare_inputs,
    declare_outputs,
    keys_and_values,
)
from edge_moe.converters.onnx.weights import Weights
from edge_moe.errors import TargetError
from edge_moe.plan import Plan
from edge_moe.spec import ModelSpec

_HEAD_UNIT = 16
_LATENT_EPSILON = 1e-6  # of the norms inside latent attention, whatever rms_norm_eps says


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
        is_latent = spec.expanded_kv_width > 0
        self._kept = {
            layer_id: self.plan.kept(row)
            for layer_id, row in zip(self.plan.moe_layer_ids, self.plan.forms, strict=True)
        }
        self._weights = Weights(self.checkpoint, self.dense)
        self._layout = layout_of(spec.model_type)
        self._epsilon = getattr(self.config, self._layout.epsilon_key)
        width = spec.query_width // spec.num_attention_heads
        rotated = self.config.qk_rope_head_dim if is_latent else width
        self._rotary = read_rotary(self.config, rotated) if self._layout.is_rotary else NO_ROTARY
        check_config(spec, self.config, self._rotary.width)
        self.heads = Heads(
            num_query=spec.num_attention_heads,
            num_kv=spec.num_kv_heads,
            width=width,
            rotary_width=self._rotary.width,
            is_interleaved=is_latent and getattr(self.config, "rope_interleave", True),
            scale=_scale(self.config, width),
        )
        self._prefixes = [
            spec.layer_prefix(layer).removesuffix(".") for layer in range(spec.num_layers)
        ]
        tensors = self.checkpoint.tensors
        self._recurrent = {
            layer: found
            for layer, prefix in enumerate(self._prefixes)
            if (found := recurrent_layer(tensors, self.config, layer, prefix)) is not None
        }

    @property
    def states(self) -> list[State]:
        """What the layers keep from one run to the next."""
        found: list[State] = []
        for layer_id in range(self.checkpoint.spec.num_layers):
            if layer_id in self._recurrent:
                found += self._recurrent[layer_id].states
            elif self._attends(layer_id):
                found += keys_and_values(layer_id, self.heads.num_kv, self.heads.width)
        return found

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
        stream = self._norm(operations, stream, spec.final_norm_name.removesuffix(".weight"))
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

    def _layer(self, operations: Operations, layer_id: int, stream: str) -> str:
        """A block that looks back and one that does not, or a single one of them."""
        op, norms = operations.graph.op, self.checkpoint.spec.family.layer_norms
        blocks = [self._looking_back, self._feed_forward]
        if len(norms) == 1:
            blocks = blocks[:1] if self._looks_back(layer_id) else blocks[1:]
        for norm, block in zip(norms, blocks, strict=True):
            inputs = self._norm(operations, stream, f"{self._prefixes[layer_id]}.{norm}")
            stream = op("Add", [stream, block(operations, layer_id, inputs)])
        return stream

    def _looks_back(self, layer_id: int) -> bool:
        return layer_id in self._recurrent or self._attends(layer_id)

    def _attends(self, layer_id: int) -> bool:
        layout = self._layout
        output = f"{self._prefixes[layer_id]}.{layout.attention}.{layout.attention_output}.weight"
        return output in self.checkpoint.tensors

    def _looking_back(self, operations: Operations, layer_id: int, inputs: str) -> str:
        if layer_id in self._recurrent:
            return self._recurrent[layer_id].mix(operations, self._weights, inputs)
        is_latent = self.checkpoint.spec.expanded_kv_width > 0
        attend = self._latent_attention if is_latent else self._attention
        prefix = f"{self._prefixes[layer_id]}.{self._layout.attention}"
        return attend(operations, layer_id, prefix, inputs)

    def _feed_forward(self, operations: Operations, layer_id: int, inputs: str) -> str:
        if layer_id in self._kept:
            return self._mixture(operations, layer_id, inputs)
        return self._mlp(operations, f"{self._prefixes[layer_id]}.{self._layout.mlp}", inputs)

    def _norm(self, operations: Operations, value: str, module: str) -> str:
        weight = self._weights.norm(module, adds_one=self._layout.adds_one)
        return operations.rms_norm(value, weight, self._epsilon)

    def _attention(self, operations: Operations, layer_id: int, prefix: str, inputs: str) -> str:
        """Query, key and value projections, with the norms that the checkpoint has."""
        layout, op = self._layout, operations.graph.op
        names = dict(zip("qk", layout.attention_norms, strict=True))
        parts, gate = [], ""
        for name, count in (("q", self.heads.num_query), ("k", self.heads.num_kv), ("v", 0)):
            value = self._weights.linear(operations, f"{prefix}.{name}_proj", inputs)
            if name == "q" and layout.has_gated_attention:
                value, gate = self._without_gate(operations, value)
            norm = f"{prefix}.{names.get(name)}"
            if f"{norm}.weight" in self.checkpoint.tensors:
                value = self._query_norm(operations, value, norm, count)
            parts.append(self._clipped(operations, value))
        query, key, value = parts
        mixed = operations.attention(query, key, value, layer_id, self.heads)
        if gate:
            mixed = op("Mul", [mixed, op("Sigmoid", [gate])])
        return self._weights.linear(operations, f"{prefix}.{layout.attention_output}", mixed)

    def _without_gate(self, operations: Operations, value: str) -> tuple[str, str]:
        """Queries and the gates of what attention gives, which every head has side by side."""
        count, width = self.heads.num_query, self.heads.width
        pairs = operations.reshape(value, 0, 0, count, 2 * width)
        query, gate = (
            operations.reshape(part, 0, 0, count * width)
            for part in operations.split(pairs, (width, width))
        )
        return query, gate

    def _query_norm(self, operations: Operations, value: str, name: str, count: int) -> str:
        """One norm for every head, or one over all of them: the width of its weight tells."""
        if self.checkpoint.tensors[f"{name}.weight"].shape[0] != self.heads.width:
            return self._norm(operations, value, name)
        by_head = operations.reshape(value, 0, 0, count, self.heads.width)
        normed = self._norm(operations, by_head, name)
        return operations.reshape(normed, 0, 0, count * self.heads.width)

    def _clipped(self, operations: Operations, value: str) -> str:
        """OLMoE may limit queries, keys and values."""
        limit = getattr(self.config, "clip_qkv", None)
        if limit is None:
            return value
        constant = operations.graph.constant
        low, high = constant(-limit, np.float32), constant(limit, np.float32)
        return operations.graph.op("Clip", [value, low, high])

    def _latent_attention(
        self, operations: Operations, layer_id: int, prefix: str, inputs: str
    ) -> str:
        """DeepSeek's attention as an ordinary one, its cache expanded (arXiv:2412.19437, 2.1.1).

        Heads are turned into [rotary part | rest]; values are as wide as keys, padded with zeros.
        """
        config, op, constant = self.config, operations.graph.op, operations.graph.constant
        count, width, rotary = self.heads.num_query, self.heads.width, self.heads.rotary_width
        plain, value_width = width - rotary, config.v_head_dim
        query = self._latent_query(operations, prefix, inputs)
        rest, turned = operations.split(
            operations.reshape(query, 0, 0, count, width), (plain, rotary)
        )
        query = op("Concat", [turned, rest], axis=-1)
        latent = self._weights.linear(operations, f"{prefix}.kv_a_proj_with_mqa", inputs)
        latent, turned = operations.split(latent, (config.kv_lora_rank, rotary))
        norm = self._weights.weight(f"{prefix}.kv_a_layernorm")
        latent = operations.rms_norm(latent, norm, _LATENT_EPSILON)
        expanded = self._weights.linear(operations, f"{prefix}.kv_b_proj", latent)
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
        mixed = operations.attention(query, key, value, layer_id, self.heads)
        mixed, _ = operations.split(
            operations.reshape(mixed, 0, 0, count, width), (value_width, width - value_width)
        )
        mixed = operations.reshape(mixed, 0, 0, count * value_width)
        return self._weights.linear(operations, f"{prefix}.o_proj", mixed)

    def _latent_query(self, operations: Operations, prefix: str, inputs: str) -> str:
        if f"{prefix}.q_proj.weight" in self.checkpoint.tensors:
            return self._weights.linear(operations, f"{prefix}.q_proj", inputs)
        latent = self._weights.linear(operations, f"{prefix}.q_a_proj", inputs)
        norm = self._weights.weight(f"{prefix}.q_a_layernorm")
        latent = operations.rms_norm(latent, norm, _LATENT_EPSILON)
        return self._weights.linear(operations, f"{prefix}.q_b_proj", latent)

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


def check_config(spec: ModelSpec, config: Any, rotary_width: int) -> None:
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
