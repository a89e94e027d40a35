"""From hidden states to logits."""

from __future__ import annotations

import numpy as np

from edge_moe.converters.onnx.data_files import StoredTensor
from edge_moe.converters.onnx.graph import Graph
from edge_moe.converters.onnx.operations import transposed_product
from edge_moe.converters.onnx.weights import Weights
from edge_moe.spec import ModelSpec


def add_logits(graph: Graph, weights: Weights, spec: ModelSpec, hidden: str) -> None:
    """`logits` [b, s, V] of normed hidden states [b, s, H]."""
    op = graph.op
    logits = transposed_product(graph, hidden, _matrix(weights, spec))
    bias = weights.optional("lm_head.bias")
    if bias is not None:
        logits = op("Add", [logits, graph.weight(bias)])
    if spec.logit_divisor != 1.0:
        logits = op("Div", [logits, graph.constant(spec.logit_divisor, np.float32)])
    if spec.logit_softcap:
        cap = graph.constant(spec.logit_softcap, np.float32)
        logits = op("Mul", [op("Tanh", [op("Div", [logits, cap])]), cap])
    op("Identity", [logits], name="logits")


def head_graph(weights: Weights, spec: ModelSpec) -> Graph:
    """Hidden states of any positions -> their logits."""
    graph = Graph(is_standard=False)
    hidden = graph.input("hidden_states", "FLOAT", ["batch", "positions", spec.hidden_size])
    add_logits(graph, weights, spec, hidden)
    graph.output("logits", "FLOAT", ["batch", "positions", spec.vocab_size])
    return graph


def _matrix(weights: Weights, spec: ModelSpec) -> StoredTensor:
    return weights.tensor(spec.head_name)
