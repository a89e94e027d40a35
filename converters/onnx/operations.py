"""What a decoder layer is made of, written with contrib operations or with standard ones.

Matrices are used as checkpoints store them, [outputs, inputs]. Letters in shapes: b batch, s new
tokens, p cached tokens, t = p + s, n attention heads, m key and value heads, d width of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_moe.converters.onnx.data_files import StoredTensor
from edge_moe.converters.onnx.graph import MICROSOFT, Graph

MASKED = float(np.finfo(np.float32).min)

Tables = Sequence[StoredTensor]
"""Cosines and sines, each [positions, rotary_width / 2]."""


@dataclass(frozen=True)
class Heads:
    """The shape of one attention."""

    num_query: int
    num_kv: int
    width: int
    rotary_width: int
    """Leading values of a head that are rotated; none where positions have no embedding."""
    is_interleaved: bool
    """Values 2i and 2i + 1 of a head rotate together, not i and i + rotary_width / 2."""
    scale: float


class Operations(ABC):
    """Adds operations to `graph`."""

    def __init__(self, graph: Graph, tables: Tables) -> None:
        """`tables` are empty where no layer rotates."""
        self.graph = graph
        self._tables = [graph.weight(table) for table in tables]

    @abstractmethod
    def rms_norm(self, value: str, weight: StoredTensor, epsilon: float) -> str:
        """Root mean square normalisation of the last axis, times `weight`."""

    @abstractmethod
    def linear(self, value: str, weight: StoredTensor) -> str:
        """`value` [..., inputs] times `weight` [outputs, inputs] transposed."""

    @abstractmethod
    def attention(self, query: str, key: str, value: str, layer: int, heads: Heads) -> str:
        """Rotary causal attention with a cache: [b, s, n d], [b, s, m d] twice -> [b, s, n d].

        Reads past_key_values.{layer}.* [b, m, p, d] and gives present.{layer}.* [b, m, t, d].
        """

    def silu_gated(self, gate: str, up: str) -> str:
        """silu(gate) * up."""
        op = self.graph.op
        return op("Mul", [op("Mul", [gate, op("Sigmoid", [gate])]), up])

    def relu_squared(self, value: str) -> str:
        """max(value, 0) squared."""
        positive = self.graph.op("Relu", [value])
        return self.graph.op("Mul", [positive, positive])

    def reshape(self, value: str, *shape: int) -> str:
        """0 keeps an axis, -1 is what is left."""
        return self.graph.op("Reshape", [value, self.graph.constant(shape)])

    def split(self, value: str, sizes: Sequence[int]) -> list[str]:
        """Cut the last axis into pieces."""
        inputs = [value, self.graph.constant(sizes)]
        return self.graph.ops("Split", inputs, len(sizes), axis=-1)


class ContribOperations(Operations):
    """Fused operations of onnxruntime, on every device that it runs on."""

    def __init__(self, graph: Graph, tables: Tables) -> None:
        super().__init__(graph, tables)
        op, one = graph.op, graph.constant([1])
        lengths = op("ReduceSum", ["attention_mask", one], keepdims=0)
        last = op("Sub", [lengths, graph.constant(1)])
        self._last_positions = op("Cast", [last], to=_elem_type(graph, "INT32"))
        total = op("Gather", [op("Shape", ["attention_mask"]), graph.constant(1)], axis=0)
        self._total = op("Cast", [total], to=_elem_type(graph, "INT32"))

    def rms_norm(self, value: str, weight: StoredTensor, epsilon: float) -> str:
        return self.graph.op(
            "SimplifiedLayerNormalization",
            [value, self.graph.weight(weight)],
            axis=-1,
            epsilon=epsilon,
            stash_type=1,
        )

    def linear(self, value: str, weight: StoredTensor) -> str:
        inputs = [value, self.graph.weight(weight)]
        return self.graph.op("FusedMatMul", inputs, domain=MICROSOFT, transB=1)

    def attention(self, query: str, key: str, value: str, layer: int, heads: Heads) -> str:
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        inputs = [query, key, value, *past, self._last_positions, self._total]
        return self.graph.ops(
            "GroupQueryAttention",
            [*inputs, *self._tables],
            [f"layers.{layer}.attention", *present],
            domain=MICROSOFT,
            num_heads=heads.num_query,
            kv_num_heads=heads.num_kv,
            do_rotary=int(heads.rotary_width > 0),
            rotary_interleaved=int(heads.is_interleaved),
            scale=heads.scale,
        )[0]


class StandardOperations(Operations):
    """The same from operations of ONNX itself: slow, for validation on sequences without padding.

    Positions count from the length of the cache.
    """

    def __init__(self, graph: Graph, tables: Tables) -> None:
        super().__init__(graph, tables)
        op, constant = graph.op, graph.constant
        total, new = (
            op("Gather", [op("Shape", [name]), constant(1)], axis=0)
            for name in ("attention_mask", "input_ids")
        )
        past = op("Sub", [total, new])
        positions = op("Range", [past, total, constant(1)])  # [s]
        self._rotation = [op("Gather", [table, positions]) for table in self._tables]
        keys = op("Range", [constant(0), total, constant(1)])  # [t]
        queries = op("Unsqueeze", [positions, constant([1])])
        is_causal = op("LessOrEqual", [keys, queries])  # [s, t]
        is_real = op("Cast", ["attention_mask"], to=_elem_type(graph, "BOOL"))  # [b, t]
        is_real = op("Unsqueeze", [is_real, constant([1, 2])])
        is_visible = op("And", [is_causal, is_real])  # [b, 1, s, t]
        zero, low = constant(0.0, np.float32), constant(MASKED, np.float32)
        self._bias = op("Where", [is_visible, zero, low])

    def rms_norm(self, value: str, weight: StoredTensor, epsilon: float) -> str:
        op, constant = self.graph.op, self.graph.constant
        mean = op("ReduceMean", [op("Mul", [value, value]), constant([-1])], keepdims=1)
        root = op("Sqrt", [op("Add", [mean, constant(epsilon, np.float32)])])
        return op("Mul", [op("Div", [value, root]), self.graph.weight(weight)])

    def linear(self, value: str, weight: StoredTensor) -> str:
        transposed = self.graph.op("Transpose", [self.graph.weight(weight)], perm=[1, 0])
        return self.graph.op("MatMul", [value, transposed])

    def attention(self, query: str, key: str, value: str, layer: int, heads: Heads) -> str:
        op, constant = self.graph.op, self.graph.constant
        query = self._rotate(self._by_head(query, heads.num_query, heads), heads)
        key = self._rotate(self._by_head(key, heads.num_kv, heads), heads)
        value = self._by_head(value, heads.num_kv, heads)
        parts = []
        for name, new in (("key", key), ("value", value)):
            past = f"past_key_values.{layer}.{name}"
            present = op("Concat", [past, new], name=f"present.{layer}.{name}", axis=2)
            parts.append(self._repeat(present, heads))
        scores = op("MatMul", [query, op("Transpose", [parts[0]], perm=[0, 1, 3, 2])])
        scores = op("Mul", [scores, constant(heads.scale, np.float32)])
        shares = op("Softmax", [op("Add", [scores, self._bias])], axis=-1)
        mixed = op("Transpose", [op("MatMul", [shares, parts[1]])], perm=[0, 2, 1, 3])
        return self.reshape(mixed, 0, 0, heads.num_query * heads.width)

    def _by_head(self, value: str, count: int, heads: Heads) -> str:
        """[b, s, count d] -> [b, count, s, d]"""
        split = self.reshape(value, 0, 0, count, heads.width)
        return self.graph.op("Transpose", [split], perm=[0, 2, 1, 3])

    def _rotate(self, value: str, heads: Heads) -> str:
        """[b, count, s, d]"""
        if not heads.rotary_width:
            return value
        op = self.graph.op
        rotary, rest = heads.rotary_width, heads.width - heads.rotary_width
        kept = ""
        if rest:
            value, kept = self.split(value, (rotary, rest))
        if heads.is_interleaved:
            pairs = self.reshape(value, 0, 0, 0, rotary // 2, 2)
            first, second = (op("Gather", [pairs, self.graph.constant(i)], axis=4) for i in (0, 1))
        else:
            first, second = self.split(value, (rotary // 2, rotary // 2))
        cos, sin = self._rotation
        new_first = op("Sub", [op("Mul", [first, cos]), op("Mul", [second, sin])])
        new_second = op("Add", [op("Mul", [second, cos]), op("Mul", [first, sin])])
        parts = [new_first, new_second, *([kept] if rest else [])]
        return op("Concat", parts, axis=-1)

    def _repeat(self, value: str, heads: Heads) -> str:
        """[b, m, t, d] -> [b, n, t, d]: every key and value head serves n / m query heads."""
        times = heads.num_query // heads.num_kv
        if times == 1:
            return value
        single = self.graph.op("Unsqueeze", [value, self.graph.constant([2])])
        repeated = self.graph.op("Expand", [single, self.graph.constant([1, 1, times, 1, 1])])
        op, constant = self.graph.op, self.graph.constant
        shape = op("Shape", [value])
        batch, rest = (
            op("Slice", [shape, constant([start]), constant([end])])
            for start, end in ((0, 1), (2, 4))
        )
        target = op("Concat", [batch, constant([heads.num_query]), rest], axis=0)
        return op("Reshape", [repeated, target])


def _elem_type(graph: Graph, name: str) -> int:
    from onnx import TensorProto

    return int(getattr(TensorProto, name))
