"""The experts of a layer as one If each, over the bytes that MoE and QMoE would read.

In standard operations for validation: codes are read as UINT2, UINT4 or UINT8 and dequantised to
float32 inside the branch of an expert that was chosen, so results do not hang on any kernel of
QMoE. There products are written as matrix [outputs, inputs] times tokens [inputs, n]: the other way
round onnxruntime 1.32 turns them into MatMulNBits, and fails on weights that come from outside of
the branch.

And in the graph that is run where no MoE node for a CPU has the activation, which is so with GELU:
matrices of codes are MatMulNBits nodes; what that costs, `edge_moe.onnx_branches` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_moe.converters.onnx.data_files import ExpertStack, StoredTensor
from edge_moe.converters.onnx.experts import INT8_ACTIVATIONS, ExpertLayer, mixing_weights
from edge_moe.converters.onnx.graph import MICROSOFT
from edge_moe.converters.onnx.operations import Operations
from edge_moe.formats.integers import IntegerForm
from edge_moe.onnx_branches import row_block_size

_CODE_TYPES = {2: "UINT2", 4: "UINT4", 8: "UINT8"}


def branch_experts(operations: Operations, layer: ExpertLayer, *, is_exact: bool) -> str:
    """The weighted sum of the chosen experts, [b, s, H]; see `OnnxOptions.is_exact`."""
    graph = operations.graph
    op, constant = graph.op, graph.constant
    hidden_size = layer.stacks[0].fc2.shape[1]
    weights = mixing_weights(operations, layer)  # [T, E]
    tokens = operations.reshape(layer.hidden, -1, hidden_size)  # [T, H]
    used = op("ReduceMax", [op("Abs", [weights]), constant([0])], keepdims=0)  # [E]
    is_used = op("Greater", [used, constant(0.0, np.float32)])
    total = op("Mul", [tokens, constant(0.0, np.float32)])
    for number, stack in enumerate(layer.stacks):
        biases = layer.biases[number] if layer.biases else (None, None)
        for index, row in enumerate(stack.rows):
            expert = _Expert(operations, layer, stack, index, biases, is_exact)
            column = op("Gather", [weights, constant(row)], axis=1)  # [T]
            with graph.branch() as then_nodes:
                added = expert.add(tokens, column, total)
            with graph.branch() as else_nodes:
                same = op("Identity", [total])
            total = op(
                "If",
                [op("Gather", [is_used, constant(row)], axis=0)],
                then_branch=graph.subgraph(then_nodes, added, ["T", hidden_size]),
                else_branch=graph.subgraph(else_nodes, same, ["T", hidden_size]),
            )
    return op("Reshape", [total, op("Shape", [layer.hidden])])


@dataclass(frozen=True)
class _Expert:
    """Number `index` of a stack."""

    operations: Operations
    layer: ExpertLayer
    stack: ExpertStack
    index: int
    biases: tuple[StoredTensor | None, StoredTensor | None]
    is_exact: bool

    def add(self, tokens: str, column: str, total: str) -> str:
        """`total` [T, H] plus this expert's output for tokens whose weight in `column` is not 0."""
        op, constant, stack = self.operations.graph.op, self.operations.graph.constant, self.stack
        positions = op("Transpose", [op("NonZero", [column])], perm=[1, 0])  # [n, 1]
        inputs = op("GatherND", [tokens, positions])  # [n, H]
        width = stack.fc1.shape[1] // 2
        first = self._product(inputs, stack.fc1, stack.scales1, self.biases[0])
        pairs = op("Reshape", [first, constant([-1, width, 2])])
        gate, up = (op("Gather", [pairs, constant(half)], axis=2) for half in (0, 1))  # [n, I]
        hidden = self.layer.activation.add(self.operations, gate, up)
        output = self._product(hidden, stack.fc2, stack.scales2, self.biases[1])  # [n, H]
        scale = op("Unsqueeze", [op("GatherND", [column, positions]), constant([1])])
        return op("ScatterND", [total, positions, op("Mul", [output, scale])], reduction="add")

    def _product(
        self,
        value: str,
        stored: StoredTensor,
        scales: StoredTensor | None,
        biases: StoredTensor | None,
    ) -> str:
        """[n, inputs] -> [n, outputs], with this expert's rows of the stacks."""
        graph, form = self.operations.graph, self.stack.integer_form
        if graph.is_standard:
            turned = graph.op("Transpose", [value], perm=[1, 0])
            product = graph.op("MatMul", [self._matrix(stored, scales), turned])
            product = graph.op("Transpose", [product], perm=[1, 0])
        elif form is None or scales is None:
            product = self.operations.linear(value, self._item(stored))
        else:
            product = self._product_of_codes(value, form, stored, scales)
        if biases is None:
            return product
        return graph.op("Add", [product, graph.weight(self._item(biases))])

    def _item(self, stored: StoredTensor) -> StoredTensor:
        return stored.item(self.index, "", stored.elem_type, stored.shape[1:])

    def _product_of_codes(
        self, value: str, form: IntegerForm, stored: StoredTensor, scales: StoredTensor
    ) -> str:
        graph, num_rows = self.operations.graph, stored.shape[1]
        width = stored.shape[2] * 8 // form.bits
        block = row_block_size(width) if form.row_blocks else form.block_size
        assert block is not None, "`check_onnx` refuses other rows"
        shape = (num_rows, width // block, block * form.bits // 8)
        codes = graph.weight(stored.item(self.index, ".codes", "UINT8", shape))
        steps = graph.weight(self._item(scales))
        if form.row_blocks:  # the row's scale for every block of it
            column = graph.op("Unsqueeze", [steps, graph.constant([1])])
            steps = graph.op("Expand", [column, graph.constant(shape[:2])])
        attributes: dict[str, Any] = {
            "K": width,
            "N": num_rows,
            "bits": form.bits,
            "block_size": block,
        }
        if not self.is_exact:
            attributes["accuracy_level"] = INT8_ACTIVATIONS
        return graph.op("MatMulNBits", [value, codes, steps], domain=MICROSOFT, **attributes)

    def _matrix(self, stored: StoredTensor, scales: StoredTensor | None) -> str:
        """[outputs, inputs], float32, in standard operations."""
        graph, form, index = self.operations.graph, self.stack.integer_form, self.index
        num_rows = stored.shape[1]
        if form is None or scales is None:
            return graph.weight(self._item(stored))
        width = stored.shape[2] * 8 // form.bits
        kind = _CODE_TYPES[form.bits]
        codes = graph.weight(stored.item(index, ".codes", kind, (num_rows, width)))
        steps = graph.weight(self._item(scales))
        zero = graph.fill(kind, scales.shape[1:], 2 ** (form.bits - 1))
        blocks: dict[str, Any] = (
            {"axis": 0} if form.row_blocks else {"axis": 1, "block_size": form.block_size}
        )
        return graph.op("DequantizeLinear", [codes, steps, zero], **blocks)
