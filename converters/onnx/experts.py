"""The experts of a layer as MoE and QMoE nodes, one per width.

A node chooses its top_k by itself where all experts of a layer have one width and the router is a
plain softmax. Otherwise the weights come from `routing`, and every node gets those of its experts:
QMoE as `router_weights`, MoE, which has no such input, as logarithms whose softmax they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_moe.converters.onnx.data_files import ExpertStack
from edge_moe.converters.onnx.graph import MICROSOFT
from edge_moe.converters.onnx.operations import Operations
from edge_moe.converters.onnx.routing import Routing, dense_weights

_SILU_GATED: dict[str, Any] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,  # gate and up rows alternate
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
}
_RELU_SQUARED = _SILU_GATED | {"activation_alpha": 1e20}
"""gate sigmoid(alpha gate) up, given the same rows twice, is the square of relu(up) to 1e-36: the
only way to it among the kernels for CPUs."""
_UNPACKED_LAYOUT = 0  # weights_prepacked: codes as they are, for every execution provider
_ROUTER_WEIGHTS = 14  # position of QMoE's input
_INT8_ACTIVATIONS = 4  # accuracy_level
_SMALLEST = 1e-30  # stands for a weight of 0, which has no logarithm


@dataclass(frozen=True)
class ExpertLayer:
    """What the experts of a layer are computed from."""

    hidden: str
    """[b, s, H]"""
    logits: str
    """[T, E] of kept experts."""
    bias: str
    """[E] selection bias, or ""."""
    routing: Routing
    stacks: tuple[ExpertStack, ...]
    has_gate: bool = True
    """silu(gate) up; else the square of relu(up)."""


@dataclass(frozen=True)
class _Node:
    """One MoE or QMoE."""

    stack: ExpertStack
    logits: str
    """[T, E] what it chooses by."""
    weights: str
    """[T, E] QMoE's own input of weights to mix with, or ""."""
    top_k: int
    renormalises: bool
    has_gate: bool


def contrib_experts(operations: Operations, layer: ExpertLayer, *, is_exact: bool) -> str:
    """The weighted sum of the chosen experts, [b, s, H]; see `OnnxOptions.is_exact`."""
    if layer.routing.is_plain and len(layer.stacks) == 1:
        return _add_node(operations, layer.hidden, _self_routed(operations, layer), is_exact)
    weights = dense_weights(operations, layer.logits, layer.bias, layer.routing)
    parts = [_weighted(operations, layer, stack, weights, is_exact) for stack in layer.stacks]
    return parts[0] if len(parts) == 1 else operations.graph.op("Sum", parts)


def _self_routed(operations: Operations, layer: ExpertLayer) -> _Node:
    routing, stack = layer.routing, layer.stacks[0]
    weights = ""
    if stack.integer_form is not None and not routing.router.renormalises:
        # without them QMoE renormalises whatever the attribute says
        weights = operations.graph.op("Softmax", [layer.logits], axis=-1)
    return _Node(
        stack, layer.logits, weights, routing.top_k, routing.router.renormalises, layer.has_gate
    )


def _weighted(
    operations: Operations, layer: ExpertLayer, stack: ExpertStack, weights: str, is_exact: bool
) -> str:
    """The share of one width. `weights` [T, E] are of all kept experts."""
    op, constant = operations.graph.op, operations.graph.constant
    if len(layer.stacks) > 1:
        weights = op("Gather", [weights, constant(stack.rows)], axis=1)
    top_k = min(layer.routing.top_k, len(stack.expert_ids))
    if stack.integer_form is not None:
        node = _Node(stack, weights, weights, top_k, False, layer.has_gate)
        return _add_node(operations, layer.hidden, node, is_exact)
    logarithms = op("Log", [op("Max", [weights, constant(_SMALLEST, np.float32)])])
    node = _Node(stack, logarithms, "", top_k, False, layer.has_gate)
    output = _add_node(operations, layer.hidden, node, is_exact)
    total = op("ReduceSum", [weights, constant([-1])], keepdims=1)  # [T, 1]
    leading = op("Slice", [op("Shape", [layer.hidden]), constant([0]), constant([2])])
    shape = op("Concat", [leading, constant([1])], axis=0)  # b, s, 1
    return op("Mul", [output, op("Reshape", [total, shape])])


def _add_node(operations: Operations, hidden: str, node: _Node, is_exact: bool) -> str:
    graph, stack, form = operations.graph, node.stack, node.stack.integer_form
    attributes = (_SILU_GATED if node.has_gate else _RELU_SQUARED) | {
        "k": node.top_k,
        "normalize_routing_weights": int(node.renormalises),
    }
    fc1, fc2 = graph.weight(stack.fc1), graph.weight(stack.fc2)
    if form is None:
        inputs = [hidden, node.logits, fc1, "", fc2]
        return graph.op("MoE", inputs, domain=MICROSOFT, **attributes)
    assert stack.scales1 is not None and stack.scales2 is not None
    scales1, scales2 = graph.weight(stack.scales1), graph.weight(stack.scales2)
    inputs = [hidden, node.logits, fc1, scales1, "", fc2, scales2]
    if node.weights:
        inputs += [""] * (_ROUTER_WEIGHTS - len(inputs)) + [node.weights]
    attributes |= {"expert_weight_bits": form.bits, "weights_prepacked": _UNPACKED_LAYOUT}
    if not form.row_blocks:
        attributes["block_size"] = form.block_size
    if form.bits == 4 and not is_exact:
        attributes["accuracy_level"] = _INT8_ACTIVATIONS
    return graph.op("QMoE", inputs, domain=MICROSOFT, **attributes)
