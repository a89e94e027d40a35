"""Operations of layers that keep a fixed state: causal convolution and linear attention.

onnxruntime has kernels for the contrib ones. The standard ones, of opset 27, are functions of other
operations, which onnxruntime takes apart. Letters in shapes as in `operations`; c channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from edge_moe.converters.onnx.data_files import StoredTensor
from edge_moe.converters.onnx.graph import MICROSOFT
from edge_moe.converters.onnx.operations import Operations
from edge_moe.converters.onnx.states import State

_OPSET = 27
"""The first whose standard operations have these."""


@dataclass(frozen=True)
class LinearHeads:
    """The shape of one linear attention; every query and key head serves equally many others."""

    num_key: int
    """Heads of queries and of keys."""
    num_value: int
    key_width: int
    value_width: int


def causal_convolution(
    operations: Operations,
    value: str,
    weight: StoredTensor,
    state: State,
    *,
    bias: StoredTensor | None = None,
    with_silu: bool = False,
) -> str:
    """Depthwise convolution over the last tokens, [b, s, c] -> [b, s, c].

    `weight` is [c, 1, k], `state` [c, k - 1] holds the inputs of the last tokens.
    """
    graph = operations.graph
    inputs = [
        graph.op("Transpose", [value], perm=[0, 2, 1]),
        graph.weight(weight),
        graph.weight(bias) if bias else "",
        state.past,
    ]
    activation = "silu" if with_silu else "none"
    mixed = _stateful(operations, "CausalConvWithState", inputs, state, activation=activation)
    return graph.op("Transpose", [mixed], perm=[0, 2, 1])


def linear_attention(
    operations: Operations,
    parts: tuple[str, str, str],
    state: State,
    heads: LinearHeads,
    *,
    decay: str,
    beta: str = "",
    scale: float,
) -> str:
    """A recurrence over tokens with a matrix per head, [b, s, value heads x value width].

    With S the state [value heads, key width, value width], for the query q, key k and value v in
    `parts` ([b, s, heads x width], packed) and `decay` g [b, s, value heads]:

        S = exp(g) S + k v                           gated: Mamba 2
        S = exp(g) S + beta k (v - exp(g) S k)       gated_delta: gated delta net, given `beta`

    and the output is scale x q S.
    """
    query, key, value = parts
    num_query = heads.num_key
    if operations.graph.is_standard:  # whose keys have as many heads as its values
        query, key = (repeat_heads(operations, part, heads) for part in (query, key))
        num_query = heads.num_value
    rule: Literal["gated", "gated_delta"] = "gated_delta" if beta else "gated"
    inputs = [query, key, value, state.past, decay, *([beta] if beta else [])]
    return _stateful(
        operations,
        "LinearAttention",
        inputs,
        state,
        q_num_heads=num_query,
        kv_num_heads=heads.num_value,
        update_rule=rule,
        scale=scale,
    )


def repeat_heads(operations: Operations, value: str, heads: LinearHeads) -> str:
    """[b, s, key heads x width] -> [b, s, value heads x width], each head several times."""
    times, width = heads.num_value // heads.num_key, heads.key_width
    if times == 1:
        return value
    single = operations.reshape(value, 0, 0, heads.num_key, 1, width)
    tiles = operations.graph.constant([1, 1, 1, times, 1])
    repeated = operations.graph.op("Tile", [single, tiles])
    return operations.reshape(repeated, 0, 0, heads.num_value * width)


def softplus(operations: Operations, value: str, bias: StoredTensor) -> str:
    """log(1 + exp(value + bias))"""
    graph = operations.graph
    return graph.op("Softplus", [graph.op("Add", [value, graph.weight(bias)])])


def negative_exponential(operations: Operations, weight: StoredTensor) -> str:
    """-exp(weight), which onnxruntime computes once, when it loads the graph."""
    graph = operations.graph
    return graph.op("Neg", [graph.op("Exp", [graph.weight(weight)])])


def _stateful(
    operations: Operations, kind: str, inputs: list[str], state: State, **attributes: Any
) -> str:
    graph = operations.graph
    domain = MICROSOFT
    if graph.is_standard:
        domain = ""
        graph.require_opset(_OPSET)
    outputs = [f"{kind}_of_{state.present}", state.present]
    return graph.ops(kind, inputs, outputs, domain=domain, **attributes)[0]
