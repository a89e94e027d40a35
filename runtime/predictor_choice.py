"""The predictors that an engine can be asked for, by name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

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

WIDE_GUESSES = "wide"
"""`ROUTER_GUESSES`, but twice as many."""
REPEAT, TRANSITIONS, TOKEN_PRIOR = "repeat", "transitions", "token"
STATE_PREDICTORS = (ROUTER_GUESSES, WIDE_GUESSES, LINEAR_GUESSES)
"""They ask about the hidden state, so that an engine makes its own."""
PREDICTORS = (*STATE_PREDICTORS, REPEAT, TRANSITIONS, TOKEN_PRIOR)
DEFAULT_PREDICTORS = (ROUTER_GUESSES, WIDE_GUESSES)
"""Tried by turns, unless somebody says."""


def require_known(names: Sequence[str]) -> None:
    """Raise InputError for a predictor that nobody knows, or none at all."""
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
