"""The predictors that an engine can be asked for, by name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from edge_moe.errors import InputError
from edge_moe.plan import MemoryTerm
from edge_moe.runtime.predictors import (
    LINEAR_GUESSES,
    PRIOR_LIMIT_BYTES,
    ROUTER_GUESSES,
    Predictor,
    Repeat,
    TokenPrior,
    Transitions,
)
from edge_moe.spec import ModelSpec

if TYPE_CHECKING:
    from edge_moe.runtime.linear_map import LinearMap  # a process that needs none stays small

WIDE_GUESSES = "wide"
"""`ROUTER_GUESSES`, but twice as many."""
REPEAT, TRANSITIONS, TOKEN_PRIOR = "repeat", "transitions", "token"
STATE_PREDICTORS = (ROUTER_GUESSES, WIDE_GUESSES, LINEAR_GUESSES)
"""They ask about the hidden state, so that an engine makes its own."""
PREDICTORS = (*STATE_PREDICTORS, REPEAT, TRANSITIONS, TOKEN_PRIOR)
DEFAULT_PREDICTORS = (ROUTER_GUESSES, WIDE_GUESSES)
"""Tried by turns, unless somebody says."""


def default_predictors(*, has_linear: bool) -> tuple[str, ...]:
    """Tried where nobody says: a map that was fitted comes in, too."""
    return (*DEFAULT_PREDICTORS, LINEAR_GUESSES) if has_linear else DEFAULT_PREDICTORS


def require_known(names: Sequence[str], *, has_linear: bool = False) -> None:
    """Raise InputError for a predictor that nobody knows, or none; and `linear` without a map."""
    if LINEAR_GUESSES in names and not has_linear:
        raise InputError(
            "the predictor linear needs a map that was fitted for the model: make one with "
            "`edge-moe fit-guesses` and give it with --linear-map"
        )
    for name in names:
        if name not in PREDICTORS:
            raise InputError(f"predictor {name!r} is unknown; known: {', '.join(PREDICTORS)}")
    if not names:
        raise InputError(f"no predictor is named: give some of {', '.join(PREDICTORS)}")


def id_predictor(name: str, num_rows: Sequence[int], top_k: int) -> Predictor:
    """One that needs ids alone; `num_rows` are the experts of each layer."""
    if name == REPEAT:
        return Repeat(num_rows)
    if name == TRANSITIONS:
        return Transitions(num_rows, top_k)
    if name == TOKEN_PRIOR:
        return TokenPrior(len(num_rows), top_k)
    raise InputError(f"predictor {name!r} needs more than ids")


def predictor_terms(names: Sequence[str], num_rows: Sequence[int]) -> list[MemoryTerm]:
    """What predictors take at most; those that take next to nothing are left out.

    A linear map says by itself what it takes.
    """
    found = []
    if TRANSITIONS in names:
        cells = sum(here * (there + 1) for here, there in pairwise(num_rows))
        found.append(("transitions", 8 * cells, "counts of pairs of experts"))
    if TOKEN_PRIOR in names:
        found.append(("token prior", PRIOR_LIMIT_BYTES, "at most, then the oldest leave"))
    return [
        MemoryTerm(name=name, num_bytes=num_bytes, source="formula", note=note)
        for name, num_bytes, note in found
    ]


def linear_term(linear: LinearMap) -> MemoryTerm:
    """What a map takes in memory."""
    note = "guesses of the next layer's experts"
    return MemoryTerm(name="linear map", num_bytes=linear.num_bytes, source="formula", note=note)


def require_linear(
    linear: LinearMap, spec: ModelSpec, fingerprint: str, kept: Sequence[Sequence[int]]
) -> None:
    """Raise InputError unless the map can guess for this model with the experts `kept`."""
    if spec.latent_width:
        raise InputError(
            f"a linear map cannot guess for {spec.model_type}, whose experts have an input of "
            "their own: leave --linear-map out"
        )
    linear.require_model(fingerprint, spec.hidden_size, spec.num_moe_layers)
    linear.for_experts(kept)
