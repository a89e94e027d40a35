"""Packing experts with what calibration knows of their inputs: GPTQ and its kin.

The moments of an expert's inputs are too large to keep for every expert, so the calibration text is
run again, layer by layer, and each layer's moments are made where they are needed. Memory: one
layer in float32, the hidden states of the text, one layer's MoE inputs (and router scores, where
every token counts) and two experts' hessians.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.calibration_memory import packing_terms
from edge_moe.converters.layer_stream import LayerStream
from edge_moe.converters.observe import OBSERVE, router_scores_of
from edge_moe.converters.second_moments import (
    WEIGHTING,
    ExpertMoments,
    expert_moments,
    moment_arguments,
)
from edge_moe.converters.stacked_experts import run_stacked
from edge_moe.formats.base import ByteArray
from edge_moe.formats.quantise import get_quantiser, pack_expert_with
from edge_moe.plan import MemoryTerm
from edge_moe.runtime.moe_block import MODULE_STACKS


@dataclass(frozen=True)
class RoutedTokens:
    """One window as a MoE block saw it."""

    inputs: Tensor
    """[T, H]"""
    expert_ids: Tensor
    """[T, k]"""
    gates: Tensor
    """[T, k] float64"""


class CalibratedPacker:
    """Weighs errors by the inputs of the calibration text. Cheapest when layers ascend.

    Going back to an earlier layer starts the text again from its embeddings.
    """

    def __init__(
        self, checkpoint: Checkpoint, quantiser: str, windows: Sequence[Sequence[int]]
    ) -> None:
        self._checkpoint = checkpoint
        self._quantiser = quantiser
        self._windows = windows
        self._stream = LayerStream(checkpoint, OBSERVE)
        self._next_layer = 0
        self._hidden: list[Tensor] = []
        self._layer_id = -1
        self._routed: list[RoutedTokens] = []
        self._scores: list[Tensor] | None = None
        self._biases: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def memory_terms(self) -> list[MemoryTerm]:
        """Upper bounds of what packing adds to a process that has imported torch, by term."""
        lengths = [len(window) for window in self._windows]
        return packing_terms(self._checkpoint, sum(lengths), max(lengths), self._quantiser)

    def pack(self, layer_id: int, expert_id: int, form: str) -> ByteArray:
        """The flat record of one expert. Safe to call from several threads, one layer at a time."""
        weights = self._checkpoint.expert(layer_id, expert_id)
        with self._lock:
            moments = self._moments_of(layer_id, expert_id, weights)
        return pack_expert_with(form, *weights, self._quantiser, **moment_arguments(moments))

    def _moments_of(self, layer_id: int, expert_id: int, weights: Any) -> ExpertMoments:
        self._go_to(layer_id)
        gate, up, down = (torch.from_numpy(matrix) for matrix in weights)
        block = self._stream.moe_block(layer_id)
        one = _OneExpert(block.experts, expert_id, torch.cat([gate, up]), down, self._biases)
        return expert_moments(
            *(one, expert_id, self._routed), weighting=WEIGHTING, token_scores=self._scores
        )

    def _go_to(self, layer_id: int) -> None:
        """Run the text up to and through the MoE layer `layer_id`, recording what it was given."""
        if self._layer_id == layer_id:
            return
        with torch.inference_mode():
            if layer_id < self._next_layer or not self._hidden:
                self._hidden = [self._stream.embed(window) for window in self._windows]
                self._next_layer = 0
            while self._next_layer <= layer_id:
                self._run_layer(self._next_layer)
                self._next_layer += 1
        self._layer_id = layer_id

    def _run_layer(self, layer_id: int) -> None:
        self._routed = []
        with self._stream.loaded(layer_id):
            if layer_id in self._checkpoint.spec.moe_layer_ids:
                experts = self._stream.moe_block(layer_id).experts
                experts.observer = _Recorder(experts, self._routed)
                self._biases = {
                    name: value.clone()
                    for name, value in experts.named_parameters()
                    if name not in MODULE_STACKS
                }
            for index, hidden in enumerate(self._hidden):
                self._hidden[index] = self._stream.run(layer_id, hidden)
            if self._routed and get_quantiser(self._quantiser).uses_every_token:
                block, spec = self._stream.moe_block(layer_id), self._checkpoint.spec
                self._scores = [router_scores_of(block, each.inputs, spec) for each in self._routed]


class _Recorder:
    """Stands in for the observer: keeps the routing, computes the experts."""

    def __init__(self, experts: Any, routed: list[RoutedTokens]) -> None:
        self._experts = experts
        self._routed = routed

    def observe(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """[T, H], [T, k], [T, k] -> [T, H]"""
        self._routed.append(RoutedTokens(hidden, ids, weights.double()))
        return run_stacked(self._experts, hidden, ids, weights)


class _OneExpert:
    """Looks like the experts module to `expert_moments`, with the weights of one expert only."""

    def __init__(
        self,
        experts: Any,
        expert_id: int,
        gate_up: Tensor,
        down: Tensor,
        biases: Mapping[str, Tensor],
    ) -> None:
        self._experts = experts
        self._biases = biases
        self.gate_up_proj = {expert_id: gate_up}
        self.down_proj = {expert_id: down}

    def __getattr__(self, name: str) -> Any:
        return self._biases[name] if name in self._biases else getattr(self._experts, name)
