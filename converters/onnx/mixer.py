"""The part of a layer that looks at earlier tokens: attention, or a recurrence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from edge_moe.converters.onnx.operations import Operations
from edge_moe.converters.onnx.states import State
from edge_moe.converters.onnx.weights import Weights


class Mixer(ABC):
    """That of layer number `layer`, whose tensors start with `prefix`."""

    def __init__(self, config: Any, layer: int, prefix: str) -> None:
        """`config` is transformers' configuration of the checkpoint."""
        self.config = config
        self.layer = layer
        self.prefix = prefix

    @property
    @abstractmethod
    def states(self) -> tuple[State, ...]:
        """What it keeps from one run to the next."""

    @abstractmethod
    def mix(self, operations: Operations, weights: Weights, inputs: str) -> str:
        """[b, s, H] -> [b, s, H]"""
