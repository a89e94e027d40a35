"""The experts of a layer without contrib operations: one If per expert, over the same bytes.

For validation. Codes are read as UINT2, UINT4 or UINT8 and dequantised to float32 inside the branch
of an expert that was chosen, so results do not hang on any kernel of QMoE. Products are written as
matrix [outputs, inputs] times tokens [inputs, n]: the other way round onnxruntime 1.32 turns them
into MatMulNBits, and fails on weights that come from outside of the branch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_moe.converters.onnx.data_files import ExpertStack, StoredTensor
from edge_moe.converters.onnx.experts import ExpertLayer
from edge_moe.converters.onnx.operations import Operations
from edge_moe.converters.onnx.routing import dense_weights

_CODE_TYPES = {2: "UINT2", 4: "UINT4", 8: "UINT8"}


def standard_experts(operations: Operations, layer: ExpertLayer) -> str:
    """The weighted sum of the chosen experts, [b, s, H]."""
    graph = operations.graph
    op, constant = graph.op, graph.constant
    hidden_size = layer.stacks[0].fc2.shape[1]
    weights = dense_weights(operations, layer.logits, layer.bias, layer.routing)  # [T, E]
    tokens = operations.reshape(layer.hidden, -1, hidden_size)  # [T, H]
    used = op("ReduceMax", [weights, constant([0])], keepdims=0)  # [E]
    is_used = op("Greater", [used, constant(0.0, np.float32)])
    total = op("Mul", [tokens, constant(0.0, np.float32)])
    for number, stack in enumerate(layer.stacks):
        for index, row in enumerate(stack.rows):
            column = op("Gather", [weights, constant(row)], axis=1)  # [T]
            with graph.branch() as then_nodes:
                added = _add_expert(operations, layer, number, index, (tokens, column, total))
            with graph.branch() as else_nodes:
                same = op("Identity", [total])
            total = op(
                "If",
                [op("Gather", [is_used, constant(row)], axis=0)],
                then_branch=graph.subgraph(then_nodes, added, ["T", hidden_size]),
                else_branch=graph.subgraph(else_nodes, same, ["T", hidden_size]),
            )
    return op("Reshape", [total, op("Shape", [layer.hidden])])


def _add_expert(
    operations: Operations,
    layer: ExpertLayer,
    number: int,
    index: int,
    values: tuple[str, str, str],
) -> str:
    """`total` [T, H] plus one expert's output for the tokens whose weight in `column` is not 0."""
    stack, (tokens, column, total) = layer.stacks[number], values
    graph = operations.graph
    op, constant = graph.op, graph.constant
    positions = op("Transpose", [op("NonZero", [column])], perm=[1, 0])  # [n, 1]
    inputs = op("Transpose", [op("GatherND", [tokens, positions])], perm=[1, 0])  # [H, n]
    width = stack.fc1.shape[1] // 2
    fc1 = _matrix(operations, stack, stack.fc1, stack.scales1, index)
    fc2 = _matrix(operations, stack, stack.fc2, stack.scales2, index)
    biases = layer.biases[number] if layer.biases else (None, None)
    first = _plus_bias(operations, op("MatMul", [fc1, inputs]), biases[0], index)
    pairs = op("Reshape", [first, constant([width, 2, -1])])
    gate, up = (op("Gather", [pairs, constant(half)], axis=1) for half in (0, 1))  # [I, n]
    output = op("MatMul", [fc2, layer.activation.add(operations, gate, up)])
    output = _plus_bias(operations, output, biases[1], index)
    output = op("Transpose", [output], perm=[1, 0])  # [n, H]
    scale = op("Unsqueeze", [op("GatherND", [column, positions]), constant([1])])
    return op("ScatterND", [total, positions, op("Mul", [output, scale])], reduction="add")


def _plus_bias(operations: Operations, value: str, biases: StoredTensor | None, index: int) -> str:
    """`value` [outputs, n] plus the bias of one expert, a row of `biases` [E, outputs]."""
    if biases is None:
        return value
    graph = operations.graph
    column = graph.weight(biases.item(index, "", "FLOAT", (biases.shape[1], 1)))
    return graph.op("Add", [value, column])


def _matrix(
    operations: Operations,
    stack: ExpertStack,
    stored: StoredTensor,
    scales: StoredTensor | None,
    index: int,
) -> str:
    """One expert's matrix [outputs, inputs], float32."""
    graph, form = operations.graph, stack.integer_form
    num_rows = stored.shape[1]
    if form is None or scales is None:
        return graph.weight(stored.item(index, "", "FLOAT", stored.shape[1:]))
    width = stored.shape[2] * 8 // form.bits
    kind = _CODE_TYPES[form.bits]
    codes = graph.weight(stored.item(index, ".codes", kind, (num_rows, width)))
    steps = graph.weight(scales.item(index, "", "FLOAT", scales.shape[1:]))
    zero = graph.fill(kind, scales.shape[1:], 2 ** (form.bits - 1))
    blocks: dict[str, Any] = (
        {"axis": 0} if form.row_blocks else {"axis": 1, "block_size": form.block_size}
    )
    return graph.op("DequantizeLinear", [codes, steps, zero], **blocks)
