"""What a transform method sees of one MoE layer, what it gives back, and how it is registered.

A method turns the experts and router rows of one layer into fewer or narrower ones. It never reads
or writes files: `edge_moe.converters.transform` streams the layers through it.
Letters: T sampled tokens, H hidden_size, I expert_width, E experts, k top_k, N experts to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_moe.errors import InputError
from edge_moe.runtime.moe_block import MoeBlock, expert_inner, expert_output, select_experts
from edge_moe.saliency import saliency
from edge_moe.spec import ModelSpec
from edge_moe.stats import ExpertStats

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Value = str | int | float

SAMPLE_TOKENS = 16384
"""What most methods sample."""
CHUNK_TOKENS = 256
"""Tokens that all experts are run on at a time, where a method asks for all outputs."""


@dataclass(frozen=True)
class LayerWeights:
    """Experts and router of one layer, float32."""

    gate_up: Tensor
    """[E, 2I, H]"""
    down: Tensor
    """[E, H, I]"""
    router: dict[str, Tensor]
    """Tensors with one row per expert, by their name under the MoE block, such as `gate.weight`."""

    @property
    def num_experts(self) -> int:
        return self.gate_up.shape[0]

    @property
    def expert_width(self) -> int:
        return self.down.shape[2]

    def select(self, expert_ids: Sequence[int]) -> LayerWeights:
        """The given experts, in that order; a copy."""
        ids = list(expert_ids)
        router = {name: select_experts(rows, ids) for name, rows in self.router.items()}
        return LayerWeights(self.gate_up[ids], self.down[ids], router)


@dataclass(frozen=True)
class LayerSamples:
    """What the layer was given for the sampled text, and what its router really did with it."""

    inputs: Tensor
    """[T, H]"""
    expert_ids: Tensor
    """[T, k]"""
    gates: Tensor
    """[T, k] float64, the weights the layer really multiplies with."""
    logits: Tensor
    """[T, E] raw router logits."""
    window_tokens: tuple[int, ...]
    """Tokens of each window, in order; their sum is T."""
    block: MoeBlock
    """With the layer's weights."""

    @property
    def num_tokens(self) -> int:
        return self.inputs.shape[0]

    def routed(self, expert_id: int) -> tuple[Tensor, Tensor]:
        """(tokens [n], gates [n]) that chose the expert, in order."""
        token, slot = (self.expert_ids == expert_id).nonzero(as_tuple=True)
        return token, self.gates[token, slot]

    def output(self, expert_id: int, tokens: Tensor | slice = slice(None)) -> Tensor:
        """[n, H] un-gated output of the expert for the given tokens, chosen or not."""
        experts = self.block.experts
        weights = experts.gate_up_proj[expert_id], experts.down_proj[expert_id]
        return expert_output(experts, self.inputs[tokens], *weights, expert_id)

    def inner(self, expert_id: int, tokens: Tensor | slice = slice(None)) -> Tensor:
        """[n, I] what the expert's down_proj multiplies."""
        experts = self.block.experts
        return expert_inner(
            experts, self.inputs[tokens], experts.gate_up_proj[expert_id], expert_id
        )

    def output_chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(tokens, [E, n, H]) outputs of all experts, at most `CHUNK_TOKENS` tokens at a time."""
        num_experts = self.logits.shape[1]
        for start in range(0, self.num_tokens, CHUNK_TOKENS):
            tokens = slice(start, min(start + CHUNK_TOKENS, self.num_tokens))
            yield tokens, torch.stack([self.output(i, tokens) for i in range(num_experts)])


@dataclass(frozen=True)
class LayerTask:
    """One layer to transform."""

    layer_id: int
    spec: ModelSpec
    weights: LayerWeights
    num_experts: int
    """N, how many experts the result has."""
    expert_width: int
    """Inner width of the result's experts."""
    settings: Mapping[str, Value]
    stats: ExpertStats | None = None
    """Statistics of the original model; None for methods that take gradients instead."""
    protected: BoolArray | None = None
    """[E] super experts: neither dropped nor changed."""
    samples: LayerSamples | None = None
    neuron_scores: FloatArray | None = None
    """[E, I]"""

    def score(self, criterion: str) -> FloatArray:
        """[E] the saliency criterion's scores in this layer."""
        if self.stats is None:
            raise RuntimeError("this method was registered without statistics")
        row = self.stats.info.moe_layer_ids.index(self.layer_id)
        scores: FloatArray = saliency(self.stats, criterion)[row]
        return scores

    def sampled(self) -> LayerSamples:
        """The samples of a method that was registered with them."""
        if self.samples is None:
            raise RuntimeError("this method was registered without samples")
        return self.samples

    def is_protected(self) -> BoolArray:
        """[E] which experts are super experts."""
        if self.protected is None:
            return np.zeros(self.weights.num_experts, np.bool_)
        return self.protected

    def number(self, name: str) -> float:
        """A numeric setting."""
        return float(self.settings[name])


@dataclass(frozen=True)
class LayerResult:
    """The new layer, and how it came about."""

    weights: LayerWeights
    members: list[list[int]]
    """For each new expert, the source experts in it; the first one's router row is kept."""
    facts: dict[str, float] = field(default_factory=dict)
    """Numbers for transform.json."""


@dataclass(frozen=True)
class Setting:
    """One knob of a method: a number within bounds, or one of some words."""

    default: Value
    meaning: str
    low: float = -np.inf
    high: float = np.inf
    words: tuple[str, ...] = ()

    def parse(self, name: str, value: Value) -> Value:
        """`value` in the type of the default.

        Raises:
            InputError: not a number, out of range, or not one of the words.
        """
        if isinstance(self.default, str):
            if self.words and value not in self.words:
                raise InputError(f"{name} is {value!r}: use one of {', '.join(self.words)}")
            return str(value)
        try:
            number = type(self.default)(value)
        except ValueError:
            number = np.nan
        if not self.low <= number <= self.high:
            raise InputError(f"{name} is {value!r}: use {self.low:g} to {self.high:g}")
        return number


Run = Callable[[LayerTask], LayerResult]
ScratchBytes = Callable[[ModelSpec, int], int]


@dataclass(frozen=True)
class Method:
    """A registered transform."""

    name: str
    summary: str
    source: str
    run: Run
    shrinks: Literal["experts", "width"]
    settings: Mapping[str, Setting]
    sample_tokens: int
    """Tokens to run the layers on unless the user says otherwise; 0 where none are needed."""
    is_sequential: bool
    """The next layer sees what the new layer computes, instead of what the original computes."""
    scratch_bytes: ScratchBytes
    """Memory beside the layer, the new layer and the samples, given the spec and T."""

    @property
    def needs_samples(self) -> bool:
        return self.sample_tokens > 0

    def parse(self, settings: Mapping[str, Value]) -> dict[str, Value]:
        """All settings, the given ones checked.

        Raises:
            InputError: a setting this method does not have, or a bad value.
        """
        for name in settings:
            if name not in self.settings:
                known = ", ".join(self.settings) or "none"
                raise InputError(f"method {self.name} has no setting {name!r}: it has {known}")
        return {
            name: setting.parse(name, settings.get(name, setting.default))
            for name, setting in self.settings.items()
        }


METHODS: dict[str, Method] = {}


def register(
    name: str,
    summary: str,
    source: str,
    *,
    shrinks: Literal["experts", "width"] = "experts",
    settings: Mapping[str, Setting] | None = None,
    sample_tokens: int = 0,
    is_sequential: bool = False,
    scratch_bytes: ScratchBytes = lambda spec, num_tokens: 0,
) -> Callable[[Run], Run]:
    """Decorator: make a function of one layer available by name."""

    def add(run: Run) -> Run:
        if name in METHODS:
            raise ValueError(f"method {name} is registered twice")
        METHODS[name] = Method(
            name,
            summary,
            source,
            run,
            shrinks,
            settings or {},
            sample_tokens,
            is_sequential,
            scratch_bytes,
        )
        return run

    return add


def all_outputs_bytes(spec: ModelSpec) -> int:
    """Memory of `LayerSamples.output_chunks` and one array of that size made of it."""
    inner = CHUNK_TOKENS * 4 * 4 * spec.expert_width
    return inner + 3 * 4 * CHUNK_TOKENS * spec.num_experts * spec.hidden_size
