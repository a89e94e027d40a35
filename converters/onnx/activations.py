"""What an expert, or a dense MLP, does between its two products: f(gate) times up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_moe.converters.onnx.operations import Operations
from edge_moe.onnx_branches import GATED_GELUS
from edge_moe.spec import ModelSpec


@dataclass(frozen=True)
class Activation:
    """g sigmoid(alpha g) (up + beta) with g = min(gate, limit) and up within +-limit.

    With the values that stand here it is silu(gate) up, which is what `gelu` takes the place of.
    """

    alpha: float = 1.0
    beta: float = 0.0
    limit: float = math.inf
    has_gate: bool = True
    """Otherwise the square of relu(up)."""
    gelu: str = ""
    """`tanh` or `none`, as ONNX calls GELU's approximations: gelu(gate) up."""

    @property
    def has_kernel(self) -> bool:
        """onnxruntime 1.32 computes such experts in a MoE node on a CPU: not with GELU."""
        return not self.gelu

    def add(self, operations: Operations, gate: str, up: str) -> str:
        """As standard operations."""
        graph = operations.graph
        op = graph.op
        if not self.has_gate:
            return operations.relu_squared(up)
        if self.gelu:
            return op("Mul", [op("Gelu", [gate], approximate=self.gelu), up])
        if self == Activation():
            return operations.silu_gated(gate, up)
        alpha, beta, low, high = (
            graph.constant(value, np.float32)
            for value in (self.alpha, self.beta, -self.limit, self.limit)
        )
        gate, up = op("Min", [gate, high]), op("Clip", [up, low, high])
        share = op("Sigmoid", [op("Mul", [gate, alpha])])
        return op("Mul", [op("Mul", [gate, share]), op("Add", [up, beta])])


def read_activation(spec: ModelSpec, config: Any, up_offset: float) -> Activation:
    """That of the experts. `up_offset` is added to up."""
    return Activation(
        alpha=getattr(config, "swiglu_alpha", 1.0),
        beta=up_offset,
        limit=getattr(config, "swiglu_limit", math.inf),
        has_gate=spec.has_gate,
        gelu=GATED_GELUS.get(spec.hidden_act, ""),
    )
