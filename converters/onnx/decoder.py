"""The decoder of every family that target onnx knows, layer by layer.

What a layer holds is told by the checkpoint's tensors: biases, norms of queries and keys, shared
experts. A checkpoint whose dense tensors are not all used is refused, so that nothing is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.onnx.data_files import (
    DenseFile,
    ExpertFile,
    StoredTensor,
    array_chunks,
    float32_chunks,
)
from edge_moe.converters.onnx.experts import ExpertLayer, contrib_experts
from edge_moe.converters.onnx.graph import MICROSOFT, Graph
from edge_moe.converters.onnx.operations import (
    ContribOperations,
    Heads,
    Operations,
    StandardOperations,
)
from edge_moe.converters.onnx.rope import Rotary, read_rotary
from edge_moe.converters.onnx.routing import Routing
from edge_moe.converters.onnx.standard import standard_experts
from edge_moe.converters.source_bytes import rows
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
        check_config(spec, self.config)
        is_latent = spec.expanded_kv_width > 0
        self._kept = {
            layer_id: self.plan.kept(row)
            for layer_id, row in zip(self.plan.moe_layer_ids, self.plan.forms, strict=True)
        }
        width = spec.query_width // spec.num_attention_heads
        self._rotary = read_rotary(
            self.config, self.config.qk_rope_head_dim if is_latent else width
        )
        self.heads = Heads(
            num_query=spec.num_attention_heads,
            num_kv=spec.num_kv_heads,
            width=width,
            rotary_width=self._rotary.width,
            is_interleaved=is_latent and getattr(self.config, "rope_interleave", True),
            scale=_scale(self.config, width),
        )
        self._used: set[str] = set()

    def graph(self, *, is_standard: bool) -> Graph:
        """The whole decoder; every weight has its place in the files afterwards.

        Logits are those of the last position, and of all in standard operations: a prompt's would
        take vocabulary x tokens x 4 bytes.

        Raises:
            TargetError: the checkpoint holds tensors that the graph has no place for.
        """
        spec, graph = self.checkpoint.spec, Graph(is_standard=is_standard)
        self._declare_inputs(graph)
        kind = StandardOperations if is_standard else ContribOperations
        operations = kind(graph, *self._rotary_tables(self._rotary))
        embedding = self._weight("model.embed_tokens")
        stream = graph.op("Gather", [graph.weight(embedding), "input_ids"])
        for layer_id in range(spec.num_layers):
            stream = self._layer(operations, layer_id, stream)
        stream = operations.rms_norm(stream, self._weight("model.norm"), self.config.rms_norm_eps)
        if not is_standard:
            graph.op("Identity", [stream], name="hidden_states")
            stream = graph.op("Gather", [stream, graph.constant([-1])], axis=1)  # [b, 1, H]
        graph.op("Identity", [operations.linear(stream, self._head())], name="logits")
        self._declare_outputs(graph)
        self._require_all_used()
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
        is_tied = self.checkpoint.spec.tie_word_embeddings
        return self._weight("model.embed_tokens" if is_tied else "lm_head")

    def _layer(self, operations: Operations, layer_id: int, stream: str) -> str:
        prefix, epsilon = f"model.layers.{layer_id}", self.config.rms_norm_eps
        op = operations.graph.op
        inputs = operations.rms_norm(stream, self._weight(f"{prefix}.input_layernorm"), epsilon)
        is_latent = self.checkpoint.spec.expanded_kv_width > 0
        attend = self._latent_attention if is_latent else self._attention
        stream = op("Add", [stream, attend(operations, layer_id, f"{prefix}.self_attn", inputs)])
        norm = self._weight(f"{prefix}.post_attention_layernorm")
        inputs = operations.rms_norm(stream, norm, epsilon)
        if layer_id in self._kept:
            return op("Add", [stream, self._mixture(operations, layer_id, inputs)])
        return op("Add", [stream, self._mlp(operations, f"{prefix}.mlp", inputs)])

    def _attention(self, operations: Operations, layer_id: int, prefix: str, inputs: str) -> str:
        """Query, key and value projections, with the norms that the checkpoint has."""
        parts = []
        for name, count in (("q", self.heads.num_query), ("k", self.heads.num_kv), ("v", 0)):
            value = self._linear(operations, f"{prefix}.{name}_proj", inputs)
            if count and f"{prefix}.{name}_norm.weight" in self.checkpoint.tensors:
                value = self._query_norm(operations, value, f"{prefix}.{name}_norm", count)
            parts.append(self._clipped(operations, value))
        query, key, value = parts
        mixed = operations.attention(query, key, value, layer_id, self.heads)
        return self._linear(operations, f"{prefix}.o_proj", mixed)

    def _query_norm(self, operations: Operations, value: str, name: str, count: int) -> str:
        """One norm for every head, or one over all of them: the width of its weight tells."""
        weight, epsilon = self._weight(name), self.config.rms_norm_eps
        if weight.shape[0] != self.heads.width:
            return operations.rms_norm(value, weight, epsilon)
        by_head = operations.reshape(value, 0, 0, count, self.heads.width)
        normed = operations.rms_norm(by_head, weight, epsilon)
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
        latent = self._linear(operations, f"{prefix}.kv_a_proj_with_mqa", inputs)
        latent, turned = operations.split(latent, (config.kv_lora_rank, rotary))
        norm = self._weight(f"{prefix}.kv_a_layernorm")
        latent = operations.rms_norm(latent, norm, _LATENT_EPSILON)
        expanded = self._linear(operations, f"{prefix}.kv_b_proj", latent)
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
        return self._linear(operations, f"{prefix}.o_proj", mixed)

    def _latent_query(self, operations: Operations, prefix: str, inputs: str) -> str:
        if f"{prefix}.q_proj.weight" in self.checkpoint.tensors:
            return self._linear(operations, f"{prefix}.q_proj", inputs)
        latent = self._linear(operations, f"{prefix}.q_a_proj", inputs)
        norm = self._weight(f"{prefix}.q_a_layernorm")
        latent = operations.rms_norm(latent, norm, _LATENT_EPSILON)
        return self._linear(operations, f"{prefix}.q_b_proj", latent)

    def _mixture(self, operations: Operations, layer_id: int, inputs: str) -> str:
        """Routed experts, and the shared one where there is one."""
        spec, graph, kept = self.checkpoint.spec, operations.graph, self._kept[layer_id]
        router, *biases = spec.router_tensor_names(layer_id)
        weight = self._rows(router, kept)
        logits = operations.reshape(operations.linear(inputs, weight), -1, len(kept))
        bias = graph.weight(self._rows(biases[0], kept)) if biases else ""
        routing = Routing(spec.router, spec.top_k, spec.num_experts, tuple(kept))
        stacks = tuple(self.experts[layer_id].stacks)
        layer = ExpertLayer(inputs, logits, bias, routing, stacks)
        if graph.is_standard:
            output = standard_experts(operations, layer)
        else:
            output = contrib_experts(operations, layer, is_exact=self.is_exact)
        shared = self._shared_expert(operations, spec.moe_prefix(layer_id), inputs)
        return graph.op("Add", [output, shared]) if shared else output

    def _shared_expert(self, operations: Operations, prefix: str, inputs: str) -> str:
        """The expert that every token goes through, gated where there is a gate; "" for none."""
        tensors, op = self.checkpoint.tensors, operations.graph.op
        for name in ("shared_expert", "shared_experts"):
            if f"{prefix}.{name}.gate_proj.weight" in tensors:
                output = self._mlp(operations, f"{prefix}.{name}", inputs)
                gate = f"{prefix}.{name}_gate"
                if f"{gate}.weight" not in tensors:
                    return output
                share = op("Sigmoid", [self._linear(operations, gate, inputs)])
                return op("Mul", [output, share])
        return ""

    def _mlp(self, operations: Operations, prefix: str, inputs: str) -> str:
        gate, up = (
            self._linear(operations, f"{prefix}.{name}_proj", inputs) for name in ("gate", "up")
        )
        hidden = operations.silu_gated(gate, up)
        return self._linear(operations, f"{prefix}.down_proj", hidden)

    def _linear(self, operations: Operations, name: str, value: str) -> str:
        output = operations.linear(value, self._weight(name))
        if f"{name}.bias" not in self.checkpoint.tensors:
            return output
        bias = operations.graph.weight(self._tensor(f"{name}.bias"))
        return operations.graph.op("Add", [output, bias])

    def _weight(self, name: str) -> StoredTensor:
        return self._tensor(f"{name}.weight")

    def _tensor(self, name: str) -> StoredTensor:
        """A dense tensor of the checkpoint, whole."""
        info = self.checkpoint.tensors[name]
        self._used.add(name)
        return self.dense.add(name, info.shape, float32_chunks([info]))

    def _rows(self, name: str, kept: Sequence[int]) -> StoredTensor:
        """The rows of kept experts."""
        info = self.checkpoint.tensors[name]
        self._used.add(name)
        shape = (len(kept), *info.shape[1:])
        return self.dense.add(name, shape, float32_chunks(rows(info, kept)))

    def _rotary_tables(self, rotary: Rotary) -> tuple[StoredTensor, StoredTensor]:
        num_rows = self.checkpoint.spec.max_position_embeddings
        shape = (num_rows, rotary.width // 2)
        cos, sin = (
            self.dense.add(name, shape, array_chunks(rotary.rows(function), num_rows))
            for name, function in (("rotary.cos", np.cos), ("rotary.sin", np.sin))
        )
        return cos, sin

    def _declare_inputs(self, graph: Graph) -> None:
        graph.input("input_ids", "INT64", ["batch", "new_tokens"])
        graph.input("attention_mask", "INT64", ["batch", "all_tokens"])
        for name in cache_names("past_key_values", self.checkpoint.spec.num_layers):
            graph.input(
                name, "FLOAT", ["batch", self.heads.num_kv, "past_tokens", self.heads.width]
            )

    def _declare_outputs(self, graph: Graph) -> None:
        spec = self.checkpoint.spec
        if graph.is_standard:
            graph.output("logits", "FLOAT", ["batch", "new_tokens", spec.vocab_size])
        else:
            graph.output("logits", "FLOAT", ["batch", 1, spec.vocab_size])
            graph.output("hidden_states", "FLOAT", ["batch", "new_tokens", spec.hidden_size])
        for name in cache_names("present", spec.num_layers):
            graph.output(
                name, "FLOAT", ["batch", self.heads.num_kv, "all_tokens", self.heads.width]
            )

    def _require_all_used(self) -> None:
        spec = self.checkpoint.spec
        skipped = {"lm_head.weight"} if spec.tie_word_embeddings else set()
        names = {info.name for info in self.checkpoint.dense_tensors}
        left = sorted(name for name in names - skipped - self._used if "rotary_emb" not in name)
        if left:
            raise TargetError(
                f"target onnx has no place for tensor {left[0]!r} ({len(left)} such): "
                "use --target native"
            )


def cache_names(prefix: str, num_layers: int) -> list[str]:
    """Names of the keys and values of every layer, as onnxruntime-genai writes them."""
    return [f"{prefix}.{layer}.{part}" for layer in range(num_layers) for part in ("key", "value")]


def check_config(spec: ModelSpec, config: Any) -> None:
    """Refuse what the graph cannot compute.

    Raises:
        TargetError: attention to a window of the text, or heads of an odd width.
    """
    width = spec.query_width // spec.num_attention_heads
    if width % _HEAD_UNIT:
        raise TargetError(
            f"target onnx: heads are {width} wide, onnxruntime's rotary attention needs a multiple "
            f"of {_HEAD_UNIT}: use --target native"
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
    scale, parameters = float(width**-0.5), config.rope_parameters
    all_dim = parameters.get("mscale_all_dim", 0)
    if parameters.get("rope_type", "default") == "default" or not all_dim:
        return scale
    factor = parameters["factor"]
    stretch = 0.1 * all_dim * math.log(factor) + 1.0 if factor > 1 else 1.0
    return scale * stretch * stretch
