"""The experts of a layer as MoE and QMoE nodes, one per width.

A node chooses its top_k by itself where all experts of a layer have one width and the router is a
plain softmax. Otherwise the weights come from `routing`, and every node gets those of its experts:
QMoE as `router_weights`, MoE, which has no such input, as logarithms whose softmax they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_moe.converters.onnx.data_files import ExpertStack
from edge_moe.converters.onnx.graph import MICROSOFT
from edge_moe.converters.onnx.operations import Operations
from edge_moe.converters.onnx.routing import Routing, dense_weights

_SILU_GATED = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,  # gate and up rows alternate
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
}
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


def contrib_experts(operations: Operations, layer: ExpertLayer, *, is_exact: bool) -> str:
    """The weighted sum of the chosen experts, [b, s, H]; see `add_experts`."""
    if layer.routing.is_plain and len(layer.stacks) == 1:
        return _self_routed(operations, layer, is_exact)
    weights = dense_weights(operations, layer.logits, layer.bias, layer.routing)
    parts = [_weighted(operations, layer, stack, weights, is_exact) for stack in layer.stacks]
    return parts[0] if len(parts) == 1 else operations.graph.op("Sum", parts)


def _self_routed(operations: Operations, layer: ExpertLayer, is_exact: bool) -> str:
    routing, stack = layer.routing, layer.stacks[0]
    renormalises = routing.router.renormalises
    weights = ""
    if stack.integer_form is not None and not renormalises:
        # without them QMoE renormalises whatever the attribute says
        weights = operations.graph.op("Softmax", [layer.logits], axis=-1)
    return _node(
        operations, layer.hidden, stack, layer.logits, weights, routing.top_k, renormalises, is_exact
    )


def _weighted(
    operations: Operations, layer: ExpertLayer, stack: ExpertStack, weights: str, is_exact: bool
) -> str:
    """The share of one width. `weights` [T, E] are of all kept experts."""
    graph = operations.graph
    op, constant = graph.op, graph.constant
    if len(layer.stacks) > 1:
        weights = op("Gather", [weights, constant(stack.rows)], axis=1)
    top_k = min(layer.routing.top_k, len(stack.expert_ids))
    if stack.integer_form is not None:
        return _node(operations, layer.hidden, stack, weights, weights, top_k, False, is_exact)
    logarithms = op("Log", [op("Max", [weights, constant(_SMALLEST, np.float32)])])
    output = _node(operations, layer.hidden, stack, logarithms, "", top_k, False, is_exact)
    total = op("ReduceSum", [weights, constant([-1])], keepdims=1)  # [T, 1]
    shape = op("Concat", [_leading_axes(operations, layer.hidden), constant([1])], axis=0)
    return op("Mul", [output, op("Reshape", [total, shape])])


def _leading_axes(operations: Operations, value: str) -> str:
    """The shape of `value` [b, s, H] without its last axis."""
    op, constant = operations.graph.op, operations.graph.constant
    return op("Slice", [op("Shape", [value]), constant([0]), constant([2])])


def _node(
    operations: Operations,
    hidden: str,
    stack: ExpertStack,
    logits: str,
    weights: str,
    top_k: int,
    renormalises: bool,
    is_exact: bool,
) -> str:
    """One MoE or QMoE; `weights` are QMoE's own input of them, or ""."""
    graph, form = operations.graph, stack.integer_form
    attributes = _SILU_GATED | {"k": top_k, "normalize_routing_weights": int(renormalises)}
    fc1, fc2 = graph.weight(stack.fc1), graph.weight(stack.fc2)
    if form is None:
        return graph.op("MoE", [hidden, logits, fc1, "", fc2], domain=MICROSOFT, **attributes)
    assert stack.scales1 is not None and stack.scales2 is not None
    scales1, scales2 = graph.weight(stack.scales1), graph.weight(stack.scales2)
    inputs = [hidden, logits, fc1, scales1, "", fc2, scales2]
    if weights:
        inputs += [""] * (_ROUTER_WEIGHTS - len(inputs)) + [weights]
    attributes |= {"expert_weight_bits": form.bits, "weights_prepacked": _UNPACKED_LAYOUT}
    if not form.row_blocks:
        attributes["block_size"] = form.block_size
    if form.bits == 4 and not is_exact:
        attributes["accuracy_level"] = _INT8_ACTIVATIONS
    return graph.op("QMoE", inputs, domain=MICROSOFT, **attributes)
