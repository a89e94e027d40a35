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
from edge_moe.converters.onnx.states import keys_and_values

_HEAD_SINK = 11  # position of GroupQueryAttention's input
MASKED = float(np.finfo(np.float32).min)

Tables = Sequence[StoredTensor]
"""Cosines and sines, each [positions, rotary_width / 2]."""


@dataclass(frozen=True)
class Heads:
    """The shape of one attention."""

    num_query: int
    num_kv: int
    width: int
    tables: Tables
    """Of the rotation; none where positions have no embedding."""
    is_interleaved: bool
    """Values 2i and 2i + 1 of a head rotate together, not i and i + rotary_width / 2."""
    scale: float
    window: int = 0
    """A token sees so many of the last tokens, itself among them; 0 for all."""

    @property
    def rotary_width(self) -> int:
        """Leading values of a head that are rotated."""
        return 2 * self.tables[0].shape[1] if self.tables else 0


class Operations(ABC):
    """Adds operations to `graph`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @abstractmethod
    def rms_norm(self, value: str, weight: StoredTensor, epsilon: float) -> str:
        """Root mean square normalisation of the last axis, times `weight`."""

    def layer_norm(
        self, value: str, weight: StoredTensor, bias: StoredTensor, epsilon: float
    ) -> str:
        """LayerNorm of the last axis."""
        inputs = [value, self.graph.weight(weight), self.graph.weight(bias)]
        return self.graph.op("LayerNormalization", inputs, axis=-1, epsilon=epsilon)

    @abstractmethod
    def attention(
        self, values: Sequence[str], layer: int, heads: Heads, sinks: StoredTensor | None = None
    ) -> str:
        """Rotary causal attention with a cache -> [b, s, n d].

        `values` are queries [b, s, n d], keys and values [b, s, m d]; `sinks` [n] are scores of
        every head that take their share and give nothing. Reads and gives `keys_and_values` of
        the layer, [b, m, p, d] and [b, m, t, d].
        """

    def linear(self, value: str, weight: StoredTensor) -> str:
        """`value` [..., inputs] times `weight` [outputs, inputs] transposed."""
        return transposed_product(self.graph, value, weight)

    def silu_gated(self, gate: str, up: str) -> str:
        """silu(gate) * up."""
        op = self.graph.op
        return op("Mul", [op("Mul", [gate, op("Sigmoid", [gate])]), up])

    def relu_squared(self, value: str) -> str:
        """max(value, 0) squared."""
        positive = self.graph.op("Relu", [value])
        return self.graph.op("Mul", [positive, positive])

    def unit_norm(self, value: str, epsilon: float, *, of_sum: bool) -> str:
        """`value` over the root of its squares' sum, or mean, along the last axis."""
        op, constant = self.graph.op, self.graph.constant
        squares = op("Mul", [value, value])
        total = op("ReduceSum" if of_sum else "ReduceMean", [squares, constant([-1])], keepdims=1)
        root = op("Sqrt", [op("Add", [total, constant(epsilon, np.float32)])])
        return op("Div", [value, root])

    def reshape(self, value: str, *shape: int) -> str:
        """0 keeps an axis, -1 is what is left."""
        return self.graph.op("Reshape", [value, self.graph.constant(shape)])

    def split(self, value: str, sizes: Sequence[int]) -> list[str]:
        """Cut the last axis into pieces."""
        inputs = [value, self.graph.constant(sizes)]
        return self.graph.ops("Split", inputs, len(sizes), axis=-1)


class ContribOperations(Operations):
    """Fused operations of onnxruntime, on every device that it runs on."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
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

    def attention(
        self, values: Sequence[str], layer: int, heads: Heads, sinks: StoredTensor | None = None
    ) -> str:
        graph, states = self.graph, keys_and_values(layer, heads.num_kv, heads.width)
        past, present = [state.past for state in states], [state.present for state in states]
        inputs = [*values, *past, self._last_positions, self._total]
        inputs += [graph.weight(table) for table in heads.tables]
        if sinks is not None:
            inputs += [""] * (_HEAD_SINK - len(inputs)) + [graph.weight(sinks)]
        return graph.ops(
            "GroupQueryAttention",
            inputs,
            [f"layers.{layer}.attention", *present],
            domain=MICROSOFT,
            num_heads=heads.num_query,
            kv_num_heads=heads.num_kv,
            do_rotary=int(heads.rotary_width > 0),
            rotary_interleaved=int(heads.is_interleaved),
            scale=heads.scale,
            local_window_size=heads.window or -1,
        )[0]


class StandardOperations(Operations):
    """The same from operations of ONNX itself: slow, for validation on sequences without padding.

    Positions count from the length of the cache.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        op, constant = graph.op, graph.constant
        total, new = (
            op("Gather", [op("Shape", [name]), constant(1)], axis=0)
            for name in ("attention_mask", "input_ids")
        )
        past = op("Sub", [total, new])
        self._positions = op("Range", [past, total, constant(1)])  # [s]
        self._keys = op("Range", [constant(0), total, constant(1)])  # [t]
        self._queries = op("Unsqueeze", [self._positions, constant([1])])
        is_causal = op("LessOrEqual", [self._keys, self._queries])  # [s, t]
        is_real = op("Cast", ["attention_mask"], to=_elem_type(graph, "BOOL"))  # [b, t]
        is_real = op("Unsqueeze", [is_real, constant([1, 2])])
        self._is_visible = op("And", [is_causal, is_real])  # [b, 1, s, t]
        self._rotations: dict[str, list[str]] = {}
        self._biases: dict[int, str] = {}

    def rms_norm(self, value: str, weight: StoredTensor, epsilon: float) -> str:
        normed = self.unit_norm(value, epsilon, of_sum=False)
        return self.graph.op("Mul", [normed, self.graph.weight(weight)])

    def attention(
        self, values: Sequence[str], layer: int, heads: Heads, sinks: StoredTensor | None = None
    ) -> str:
        op, constant = self.graph.op, self.graph.constant
        query, key, value = values
        query = self._rotate(self._by_head(query, heads.num_query, heads), heads)
        key = self._rotate(self._by_head(key, heads.num_kv, heads), heads)
        value = self._by_head(value, heads.num_kv, heads)
        parts = []
        states = keys_and_values(layer, heads.num_kv, heads.width)
        for state, new in zip(states, (key, value), strict=True):
            present = op("Concat", [state.past, new], name=state.present, axis=2)
            parts.append(self._repeat(present, heads))
        scores = op("MatMul", [query, op("Transpose", [parts[0]], perm=[0, 1, 3, 2])])
        scores = op("Mul", [scores, constant(heads.scale, np.float32)])
        scores = op("Add", [scores, self._bias(heads.window)])
        shares = self._shares(scores, sinks)
        mixed = op("Transpose", [op("MatMul", [shares, parts[1]])], perm=[0, 2, 1, 3])
        return self.reshape(mixed, 0, 0, heads.num_query * heads.width)

    def _bias(self, window: int) -> str:
        """0 for what a token may see, [b, 1, s, t]."""
        op, constant = self.graph.op, self.graph.constant
        if window not in self._biases:
            is_visible = self._is_visible
            if window:
                oldest = op("Sub", [self._queries, constant(window)])
                is_visible = op("And", [is_visible, op("Greater", [self._keys, oldest])])
            zero, low = constant(0.0, np.float32), constant(MASKED, np.float32)
            self._biases[window] = op("Where", [is_visible, zero, low])
        return self._biases[window]

    def _shares(self, scores: str, sinks: StoredTensor | None) -> str:
        """Softmax of scores [b, n, s, t]; sinks are one column more, and left out again."""
        op, constant = self.graph.op, self.graph.constant
        if sinks is None:
            return op("Softmax", [scores], axis=-1)
        own = op("Unsqueeze", [self.graph.weight(sinks), constant([1, 2])])  # [n, 1, 1]
        rows = op("Slice", [op("Shape", [scores]), constant([0]), constant([3])])
        shape = op("Concat", [rows, constant([1])], axis=0)
        column = op("Expand", [own, shape])  # [b, n, s, 1]
        shares = op("Softmax", [op("Concat", [scores, column], axis=-1)], axis=-1)
        return op("Slice", [shares, constant([0]), constant([-1]), constant([3])])

    def _rotation(self, tables: Tables) -> list[str]:
        """Cosines and sines of the new tokens, [s, rotary_width / 2]."""
        name = tables[0].name
        if name not in self._rotations:
            self._rotations[name] = [
                self.graph.op("Gather", [self.graph.weight(table), self._positions])
                for table in tables
            ]
        return self._rotations[name]

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
        cos, sin = self._rotation(heads.tables)
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


def transposed_product(graph: Graph, value: str, weight: StoredTensor) -> str:
    """`value` [..., inputs] times `weight` [outputs, inputs] transposed."""
    if not graph.is_standard:
        inputs = [value, graph.weight(weight)]
        return graph.op("FusedMatMul", inputs, domain=MICROSOFT, transB=1)
    transposed = graph.op("Transpose", [graph.weight(weight)], perm=[1, 0])
    return graph.op("MatMul", [value, transposed])


def _elem_type(graph: Graph, name: str) -> int:
    from onnx import TensorProto

    return int(getattr(TensorProto, name))
