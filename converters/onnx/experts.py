"""The experts of a layer as MoE and QMoE nodes, one per width.

A node chooses its top_k by itself where all experts of a layer have one width and the router is a
plain softmax. Otherwise the weights come from `routing`, and every node gets those of its experts:
QMoE as `router_weights`, MoE, which has no such input, as logarithms whose softmax they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_moe.converters.onnx.activations import Activation
from edge_moe.converters.onnx.data_files import ExpertStack, StoredTensor
from edge_moe.converters.onnx.graph import MICROSOFT
from edge_moe.converters.onnx.operations import Operations
from edge_moe.converters.onnx.routing import Routing, dense_weights

_STEEP = 1e20
"""gate sigmoid(alpha gate) up with such an alpha, given the same rows twice, is the square of
relu(up) to 1e-36: the only way to it among the kernels for CPUs."""
_UNPACKED_LAYOUT = 0  # weights_prepacked: codes as they are, for every execution provider
_ROUTER_WEIGHTS = 14  # position of QMoE's input
INT8_ACTIVATIONS = 4
"""accuracy_level of products whose activations are rounded to 8 bits."""
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
    activation: Activation
    biases: tuple[tuple[StoredTensor, StoredTensor], ...] = ()
    """Of both products, [E, 2I] and [E, H] for each stack, where experts have them."""
    factors: str = ""
    """[E] on the weights of kept experts, or ""."""


@dataclass(frozen=True)
class _Node:
    """One MoE or QMoE."""

    index: int
    """Of its stack."""
    logits: str
    """[T, E] what it chooses by."""
    weights: str
    """[T, E] QMoE's own input of weights to mix with, or ""."""
    top_k: int
    renormalises: bool


def contrib_experts(operations: Operations, layer: ExpertLayer, *, is_exact: bool) -> str:
    """The weighted sum of the chosen experts, [b, s, H]; see `OnnxOptions.is_exact`."""
    if layer.routing.is_plain and len(layer.stacks) == 1 and not layer.factors:
        return _add_node(operations, layer, _self_routed(operations, layer), is_exact)
    weights = mixing_weights(operations, layer)
    parts = [
        _weighted(operations, layer, index, weights, is_exact) for index in range(len(layer.stacks))
    ]
    return parts[0] if len(parts) == 1 else operations.graph.op("Sum", parts)


def mixing_weights(operations: Operations, layer: ExpertLayer) -> str:
    """What every kept expert's output is multiplied by, [T, E]; 0 where it was not chosen."""
    weights = dense_weights(operations, layer.logits, layer.bias, layer.routing)
    return operations.graph.op("Mul", [weights, layer.factors]) if layer.factors else weights


def _self_routed(operations: Operations, layer: ExpertLayer) -> _Node:
    routing, stack = layer.routing, layer.stacks[0]
    weights = ""
    if stack.integer_form is not None and not routing.router.renormalises:
        # without them QMoE renormalises whatever the attribute says
        weights = operations.graph.op("Softmax", [layer.logits], axis=-1)
    return _Node(0, layer.logits, weights, routing.top_k, routing.router.renormalises)


def _weighted(
    operations: Operations, layer: ExpertLayer, index: int, weights: str, is_exact: bool
) -> str:
    """The share of one width. `weights` [T, E] are of all kept experts."""
    op, constant = operations.graph.op, operations.graph.constant
    stack = layer.stacks[index]
    if len(layer.stacks) > 1:
        weights = op("Gather", [weights, constant(stack.rows)], axis=1)
    top_k = min(layer.routing.top_k, len(stack.expert_ids))
    if stack.integer_form is not None:
        node = _Node(index, weights, weights, top_k, renormalises=False)
        return _add_node(operations, layer, node, is_exact)
    logarithms = op("Log", [op("Max", [weights, constant(_SMALLEST, np.float32)])])
    node = _Node(index, logarithms, "", top_k, renormalises=False)
    output = _add_node(operations, layer, node, is_exact)
    total = op("ReduceSum", [weights, constant([-1])], keepdims=1)  # [T, 1]
    leading = op("Slice", [op("Shape", [layer.hidden]), constant([0]), constant([2])])
    shape = op("Concat", [leading, constant([1])], axis=0)  # b, s, 1
    return op("Mul", [output, op("Reshape", [total, shape])])


def _add_node(operations: Operations, layer: ExpertLayer, node: _Node, is_exact: bool) -> str:
    graph, hidden, stack = operations.graph, layer.hidden, layer.stacks[node.index]
    form = stack.integer_form
    attributes = _attributes(layer.activation) | {
        "k": node.top_k,
        "normalize_routing_weights": int(node.renormalises),
    }
    fc1, fc2 = graph.weight(stack.fc1), graph.weight(stack.fc2)
    bias1, bias2 = map(graph.weight, layer.biases[node.index]) if layer.biases else ("", "")
    if form is None:
        inputs = [hidden, node.logits, fc1, bias1, fc2, bias2]
        return graph.op("MoE", inputs, domain=MICROSOFT, **attributes)
    assert stack.scales1 is not None and stack.scales2 is not None
    scales1, scales2 = graph.weight(stack.scales1), graph.weight(stack.scales2)
    inputs = [hidden, node.logits, fc1, scales1, bias1, fc2, scales2, bias2]
    if node.weights:
        inputs += [""] * (_ROUTER_WEIGHTS - len(inputs)) + [node.weights]
    attributes |= {"expert_weight_bits": form.bits, "weights_prepacked": _UNPACKED_LAYOUT}
    if not form.row_blocks:
        attributes["block_size"] = form.block_size
    if form.bits == 4 and not is_exact:
        attributes["accuracy_level"] = INT8_ACTIVATIONS
    return graph.op("QMoE", inputs, domain=MICROSOFT, **attributes)


def _attributes(activation: Activation) -> dict[str, Any]:
    """How MoE and QMoE are told the activation."""
    found: dict[str, Any] = {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,  # gate and up rows alternate
        "activation_alpha": activation.alpha if activation.has_gate else _STEEP,
        "activation_beta": activation.beta,
    }
    if activation.limit < math.inf:
        found["swiglu_limit"] = activation.limit
    return found
