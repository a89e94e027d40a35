"""What a layer of the graph keeps from one run to the next: keys and values, or fixed states.

Names are those of onnxruntime-genai, which finds a model's states by them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from edge_moe.converters.onnx.graph import Graph

Kind = Literal["key", "value", "conv", "recurrent"]
_TOKENS = {"past": "past_tokens", "present": "all_tokens"}


@dataclass(frozen=True)
class State:
    """One tensor that a run takes and gives back, float32."""

    layer: int
    kind: Kind
    shape: tuple[int, ...]
    """Without the batch, and without the tokens of keys and values [b, m, tokens, d]."""

    @property
    def past(self) -> str:
        """Name of the input."""
        return past_name(self.kind).replace("%d", str(self.layer))

    @property
    def present(self) -> str:
        """Name of the output."""
        return present_name(self.kind).replace("%d", str(self.layer))

    @property
    def has_tokens(self) -> bool:
        """It grows by the run's tokens."""
        return self.kind in ("key", "value")


def past_name(kind: Kind) -> str:
    """Name of the input of any layer, which stands as %d."""
    return f"past{'_key_values' if kind in ('key', 'value') else ''}.%d.{kind}"


def present_name(kind: Kind) -> str:
    """Name of the output of any layer."""
    return f"present.%d.{kind}"


def keys_and_values(layer: int, num_heads: int, width: int) -> tuple[State, State]:
    """The cache of an attention layer."""
    shape = (num_heads, width)
    return State(layer, "key", shape), State(layer, "value", shape)


def declare_inputs(graph: Graph, states: Iterable[State]) -> None:
    """Make every state an input of the graph."""
    for state in states:
        graph.input(state.past, "FLOAT", _dimensions(state, "past"))


def declare_outputs(graph: Graph, states: Iterable[State]) -> None:
    """Make every state an output of the graph."""
    for state in states:
        graph.output(state.present, "FLOAT", _dimensions(state, "present"))


def _dimensions(state: State, when: str) -> list[int | str]:
    if not state.has_tokens:
        return ["batch", *state.shape]
    num_heads, width = state.shape
    return ["batch", num_heads, _TOKENS[when], width]
