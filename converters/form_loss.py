"""How much each expert's output changes when its weights are stored in each form.

One expert in one form is in memory at a time, and every expert is packed once per form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.block_sums import RoutedWindow
from edge_moe.converters.calibration_memory import PACK_CHUNK_WEIGHTS
from edge_moe.converters.second_moments import (
    WEIGHTING,
    ExpertMoments,
    expert_moments,
)
from edge_moe.formats import DROP, get_form, split_form
from edge_moe.formats.quantise import get_quantiser, pack_matrix
from edge_moe.moments import LayerMoments
from edge_moe.runtime.moe_block import expert_inner, expert_output
from edge_moe.spec import ModelSpec

LOSSLESS = {"BF16": ("bf16", "f32"), "F16": ("f16", "f32"), "F32": ("f32",)}
"""Stored dtype -> forms that hold it without loss."""

Exact = tuple[bool, bool, bool]
"""Whether a form holds the stored (gate_proj, up_proj, down_proj) of an expert without loss."""


class ExpertSource(Protocol):
    """Where experts come from, and how they are stored there."""

    @property
    def spec(self) -> ModelSpec: ...

    def exact_parts(self, layer_id: int, expert_id: int, form: str) -> Exact:
        """Which projections of an expert stay as they are in `form`."""


class CheckpointExperts:
    """The experts of a Hugging Face checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.spec = checkpoint.spec

    def exact_parts(self, layer_id: int, expert_id: int, form: str) -> Exact:
        """All three or none: they are packed together."""
        is_exact = is_lossless(form, self._checkpoint.expert_dtypes(layer_id, expert_id))
        return is_exact, is_exact, is_exact


@dataclass(frozen=True)
class FormChange:
    """How storing one expert in one form changes its output on one window."""

    expert_id: int
    form: int
    """Position among the forms."""
    window: int
    """Position among the windows."""
    token: Tensor
    """[n] tokens of the window that chose the expert."""
    gates: Tensor
    """[n] float64"""
    change: Tensor
    """[n, H] float64, un-gated: f_form - f."""

    @property
    def loss(self) -> float:
        """Sum over tokens of (g |f - f_form|)**2."""
        return float((self.gates.square() * self.change.square().sum(dim=1)).sum())


class FormLosses:
    """Losses of one MoE layer; expert by expert, over all of its windows.

    Cost per routed token: (1 + number of lossy forms) x 6HI floating point operations; besides, the
    moments that the quantiser needs (see `layer_moments`).
    """

    def __init__(
        self,
        source: ExpertSource,
        forms: Sequence[str],
        quantiser: str = "nearest",
        *,
        prefers_squares: bool = False,
    ) -> None:
        """`forms` in the order of the statistics' last axis.

        With `prefers_squares` a quantiser that can do without hessians gets what statistics keep,
        see `LayerMoments`, as from a builder that does not run the text again.
        """
        spec = source.spec
        self._source = source
        self._quantiser = quantiser
        needs = get_quantiser(quantiser).needs
        self._takes_squares = prefers_squares and "squares" in needs
        self._scores: Sequence[Tensor] | None = None
        self._forms = tuple(forms)
        self._gate_up = torch.empty(spec.inner_rows, spec.expert_hidden)
        self._down = torch.empty(spec.expert_hidden, spec.expert_width)
        self._outer_form = ""
        """What `_gate_up` holds of the expert at hand."""

    def measure(
        self,
        layer_id: int,
        experts: Any,
        windows: Sequence[RoutedWindow],
        on_expert: Callable[[], None],
        scores: Callable[[], Sequence[Tensor]],
    ) -> npt.NDArray[np.float64]:
        """[windows, E, F] sum over routed tokens of (g |f - f_form|)**2; `drop` stays 0."""
        num_experts = self._source.spec.num_experts
        losses = np.zeros((len(windows), num_experts, len(self._forms)))
        for each in self.changes(layer_id, experts, windows, on_expert, scores):
            losses[each.window, each.expert_id, each.form] = each.loss
        return losses

    def changes(
        self,
        layer_id: int,
        experts: Any,
        windows: Sequence[RoutedWindow],
        on_expert: Callable[[], None],
        scores: Callable[[], Sequence[Tensor]],
    ) -> Iterator[FormChange]:
        """What every lossy packed form does to every expert of a MoE block on every window.

        `experts` is transformers' experts module, or what looks like it; `scores` gives the
        router's [T, E] on every window, and is asked where every token counts.
        """
        if get_quantiser(self._quantiser).uses_every_token:
            self._scores = scores()
        for expert_id in range(self._source.spec.num_experts):
            routed = [(window.expert_ids == expert_id).nonzero(as_tuple=True) for window in windows]
            if any(len(token) for token, _ in routed):
                yield from self._expert_changes(layer_id, experts, expert_id, windows, routed)
            on_expert()

    def _lossy_forms(self, layer_id: int, expert_id: int) -> dict[int, Exact]:
        """Position of every form that changes this expert's stored weights -> what it keeps."""
        kept = {
            position: self._source.exact_parts(layer_id, expert_id, form)
            for position, form in enumerate(self._forms)
            if form != DROP
        }
        return {position: exact for position, exact in kept.items() if not all(exact)}

    def _expert_changes(
        self,
        layer_id: int,
        experts: Any,
        expert_id: int,
        windows: Sequence[RoutedWindow],
        routed: Sequence[tuple[Tensor, ...]],
    ) -> Iterator[FormChange]:
        """Each window is multiplied on its own."""
        lossy = self._lossy_forms(layer_id, expert_id)
        if not lossy:
            return
        gate_up, down = experts.gate_up_proj[expert_id], experts.down_proj[expert_id]
        exact = [
            expert_output(experts, window.inputs[token], gate_up, down, expert_id)
            for window, (token, _) in zip(windows, routed, strict=True)
        ]
        moments = None
        if get_quantiser(self._quantiser).needs:
            moments = expert_moments(
                *(experts, expert_id, windows),
                weighting="none" if self._takes_squares else WEIGHTING,
                token_scores=self._scores,
                with_hessians=not self._takes_squares,
            )
        self._outer_form = ""
        for position, kept in sorted(lossy.items(), key=lambda item: self._order(item[0])):
            self._store(self._forms[position], gate_up, down, moments)
            self._restore(gate_up, down, kept)
            for row, (window, (token, slot)) in enumerate(zip(windows, routed, strict=True)):
                stored = expert_output(
                    experts, window.inputs[token], self._gate_up, self._down, expert_id
                )
                yield FormChange(
                    expert_id=expert_id,
                    form=position,
                    window=row,
                    token=token,
                    gates=window.gates[token, slot],
                    change=(stored - exact[row]).double(),
                )

    def _order(self, position: int) -> tuple[str, bool]:
        """A mix comes right after what its gate_proj and up_proj are stored in."""
        outer, _, inner = split_form(self._forms[position])
        return outer, inner != outer

    def _store(
        self, form: str, gate_up: Tensor, down: Tensor, moments: ExpertMoments | None
    ) -> None:
        """Put what `form` holds of one expert into the buffers, where it is not there already."""
        outer, _, inner = split_form(form)
        if outer != self._outer_form:
            self._store_matrix(outer, gate_up, self._gate_up, moments, is_down=False)
        self._outer_form = outer
        self._store_matrix(inner, down, self._down, moments, is_down=True)

    def _store_matrix(
        self,
        form: str,
        weights: Tensor,
        output: Tensor,
        moments: ExpertMoments | None,
        *,
        is_down: bool,
    ) -> None:
        """Pack and unpack `weights` into `output`."""
        if self._quantiser == "nearest":
            round_trip(form, weights, output)
            return
        known: dict[str, Any] = {}
        if moments is not None:
            squares = moments.inner_squares if is_down else moments.input_squares
            hessian = None if moments.hessians is None else moments.hessians[is_down]
            known = {
                "input_squares": squares,
                "hessian": hessian,
                "routed_tokens": moments.num_tokens,
            }
        packed = pack_matrix(form, weights.numpy(), quantiser=self._quantiser, **known)
        output.numpy()[...] = get_form(form).unpack(packed, weights.shape[1])

    def _restore(self, gate_up: Tensor, down: Tensor, kept: Exact) -> None:
        """Put back the projections that the form leaves as they are stored."""
        num_gates = len(gate_up) - down.shape[1]
        parts = slice(num_gates), slice(num_gates, None)
        for rows, is_kept in zip(parts, kept[:2], strict=True):
            if is_kept:
                self._gate_up[rows] = gate_up[rows]
        if kept[2]:
            self._down.copy_(down)


def add_moments(experts: Any, windows: Sequence[RoutedWindow], spec: ModelSpec) -> LayerMoments:
    """Second moments of every expert's inputs over the tokens that chose it.

    Cost per routed token: 4HI floating point operations; memory: one expert's tokens of a window.
    """
    moments = LayerMoments.zeros_of(spec)
    for expert_id in range(spec.num_experts):
        for window in windows:
            inputs = window.inputs[(window.expert_ids == expert_id).any(dim=1)]
            if not len(inputs):
                continue
            inner = expert_inner(experts, inputs, experts.gate_up_proj[expert_id], expert_id)
            moments.input_squares.add(_square_sums(inputs), index=expert_id)
            moments.inner_squares.add(_square_sums(inner), index=expert_id)
    return moments


def _square_sums(values: Tensor) -> npt.NDArray[np.float64]:
    """[n, width] -> [width]"""
    sums: npt.NDArray[np.float64] = values.double().square().sum(dim=0).numpy()
    return sums


def round_trip(form_name: str, weights: Tensor, output: Tensor) -> None:
    """Pack and unpack `weights` [rows, width] into `output`, a bounded number of rows at a time.

    Every form packs each row on its own, so this is what packing the whole matrix gives.
    """
    form = get_form(form_name)
    source, target = weights.numpy(), output.numpy()
    num_rows, width = source.shape
    step = max(1, PACK_CHUNK_WEIGHTS // width)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        target[rows] = form.unpack(form.pack(source[rows]), width)


def is_lossless(form: str, dtypes: Sequence[str]) -> bool:
    """Whether `form` holds what is stored in `dtypes` without loss."""
    return all(form in LOSSLESS.get(dtype, ()) for dtype in dtypes)
