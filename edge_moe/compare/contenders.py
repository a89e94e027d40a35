"""Ways to spend the same expert bytes that need nothing but a form per expert.

All obey one `Problem`: its byte budget and the rules of its target. Under `expert` scope a
published method gets what it was published with, equal counts per layer, and what is left over
goes to the first layers; under `layer` or `model` scope every layer keeps the same number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from edge_moe.errors import BudgetError, InputError
from edge_moe.formats import get_form
from edge_moe.optimise import solve
from edge_moe.problem import BoolArray, FloatArray, IntArray, Problem, smallest_bytes
from edge_moe.programs import BIT_FORMS, BitForms, gemq, pmq, pmq_cost
from edge_moe.saliency import CRITERIA, random_scores, saliency
from edge_moe.stats import ExpertStats

RANDOM_SEEDS = (0, 1, 2)
SOLVE_SECONDS = 20.0
BIT_CLASSES = {4: ("q4_k", "q4_0"), 8: ("q8_0",)}
"""Bits -> forms that pruned models are stored in, preferred first."""


class Kind(StrEnum):
    """What a method does; one line of the plot each."""

    PLAN = "edge-moe"
    PRUNE = "prune"
    MERGE = "merge or narrow"
    QUANTISE = "one type for all"
    MIXED = "mixed bits, none dropped"
    RANDOM = "random retention"


@dataclass(frozen=True, eq=False)
class Contender:
    """One way to spend the bytes."""

    name: str
    kind: Kind
    choice: IntArray
    """[L, E] position among the problem's forms."""


@dataclass(frozen=True, eq=False)
class Field:
    """Everything contenders are made from."""

    problem: Problem
    forms: Sequence[str]
    stats: ExpertStats
    supers: BoolArray
    """[L, E] super experts, which every criterion keeps first."""
    gradient_cost: FloatArray | None = None
    """[L, E, F] costs comparable across layers by the loss gradient, for GEMQ."""


def contenders(field: Field) -> Iterator[Contender]:
    """Every published method that fits the budget; what does not fit is left out."""
    yield from _one_type(field)
    yield from _mixed_bits(field)
    for form in kept_forms(field.forms):
        for name in CRITERIA:
            if name != "random":
                yield from _pruned(field, name, Kind.PRUNE, saliency(field.stats, name), form)
        for seed in RANDOM_SEEDS:
            scores = random_scores(field.stats, seed)
            yield from _pruned(field, f"random, draw {seed + 1}", Kind.RANDOM, scores, form)


def kept_forms(forms: Sequence[str]) -> list[int]:
    """Positions of the forms that pruned models are kept in: 4 bits, 8 bits and the last one."""
    found = [
        next((list(forms).index(name) for name in names if name in forms), None)
        for names in BIT_CLASSES.values()
    ]
    return [*(index for index in found if index is not None), len(forms) - 1]


def form_label(form: str) -> str:
    """`4 bits`; 16 for a form that loses nothing."""
    return f"{int(get_form(form).bits_per_weight)} bits"


def counts_for(problem: Problem, form: int) -> IntArray | None:
    """[L] experts that every layer keeps in `form`, as many as the budget holds, or None."""
    num_layers, num_experts = problem.loss.shape[:2]
    affordable = problem.budget_bytes // int(problem.form_bytes[form])
    per_layer, extra = divmod(affordable, num_layers)
    counts = np.full(num_layers, min(per_layer, num_experts), np.int64)
    if problem.scope == "expert" and per_layer < num_experts:
        counts[:extra] += 1
    return None if counts.min() < problem.top_k else counts


def _pruned(
    field: Field, name: str, kind: Kind, scores: FloatArray, form: int
) -> Iterator[Contender]:
    problem = field.problem
    counts = counts_for(problem, form)
    if counts is None or counts.min() == scores.shape[1] or problem.num_groups > 1:
        return
    if (field.supers.sum(axis=1) > counts).any():
        return
    order = np.lexsort((-scores, ~field.supers), axis=1)
    rank = np.argsort(order, axis=1)
    choice = np.where(rank < counts[:, None], form, 0)
    yield Contender(f"{name}, {form_label(field.forms[form])}", kind, choice)


def _one_type(field: Field) -> Iterator[Contender]:
    """Every expert in the largest form that fits all of them, and all ternary."""
    problem = field.problem
    shape = problem.loss.shape[:2]
    fits = problem.form_bytes * problem.loss[..., 0].size <= problem.budget_bytes
    fitting = np.flatnonzero(fits)[1:].tolist()
    ternary = [index for index in fitting if field.forms[index].startswith("tq")]
    for index in dict.fromkeys([*fitting[-1:], *ternary]):
        yield Contender(f"all {field.forms[index]}", Kind.QUANTISE, np.full(shape, index))


def _mixed_bits(field: Field) -> Iterator[Contender]:
    """No expert dropped: our program, MC-MoE's and GEMQ's."""
    problem = field.problem
    kept = problem.only_forms(list(range(1, len(problem.form_bytes))), problem.budget_bytes)
    least_bytes = smallest_bytes(kept)
    if least_bytes is not None and least_bytes <= problem.budget_bytes:
        choice = solve(kept, SOLVE_SECONDS).choice
        yield Contender("edge-moe's program without dropping", Kind.MIXED, choice)
    if problem.scope != "expert" or not set(BIT_FORMS.values()) <= set(field.forms):
        return
    bit_forms = BitForms.named(field.forms)
    try:
        solution = pmq(problem, _pmq_cost(field), bit_forms)
        yield Contender("MC-MoE (PMQ), 1-3 bits", Kind.MIXED, solution.choice)
        if field.gradient_cost is not None:
            solution = gemq(problem, field.gradient_cost, bit_forms)
            yield Contender("GEMQ, 1-3 bits", Kind.MIXED, solution.choice)
    except BudgetError:
        return


def _pmq_cost(field: Field) -> FloatArray:
    """[L, E, F] MC-MoE's cost from the same statistics."""
    stats = field.stats
    num_tokens = max(1, stats.info.num_tokens)
    form_loss = np.zeros(field.problem.loss.shape)
    measured = stats.form_loss.values()
    for index, form in enumerate(field.forms):
        if form in stats.info.forms:
            form_loss[..., index] = measured[..., stats.form_index(form)]
    gate_mean = stats.expert_sums["router_score"].values() / num_tokens
    return pmq_cost(stats.routed_tokens / num_tokens, gate_mean, form_loss)


def parse_share(text: str) -> float:
    """`50%` or `0.5` -> 0.5.

    Raises:
        InputError: not a share above 0 and at most 1.
    """
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(f"share {text!r} is none: use 50% or 0.5, above 0 and at most 1")
    return share
