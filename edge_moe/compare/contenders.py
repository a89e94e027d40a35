"""Ways to spend the same expert bytes that need nothing but a form per expert.

All obey one `Problem`: its byte budget and the rules of its target. Under `expert` scope a
published method gets what it was published with, equal counts per layer, and what is left over
goes to the first layers; under `layer` or `model` scope every layer keeps the same number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from edge_moe.errors import BudgetError, SolverError, StatsError
from edge_moe.formats import form_bits
from edge_moe.loss_table import DEFAULT_LOSS, GRADIENT_LOSS, DropLoss, LayerScale
from edge_moe.optimise import solve
from edge_moe.problem import BoolArray, FloatArray, IntArray, Problem, smallest_bytes
from edge_moe.published import published_programs
from edge_moe.saliency import CRITERIA, keep_largest, random_scores, saliency
from edge_moe.search import Evidence
from edge_moe.stats import ExpertStats

RANDOM_SEEDS = (0, 1, 2)
SOLVE_SECONDS = 20.0
LOSSES = {
    "gradients, first order": GRADIENT_LOSS,
    "gradients, diagonal": replace(GRADIENT_LOSS, layers=LayerScale.DIAGONAL),
    "relative change": DEFAULT_LOSS,
    "relative change, dropping once": replace(DEFAULT_LOSS, drop_factor=1.0),
    "relative change, no prior": replace(DEFAULT_LOSS, prior_tokens=0.0),
    "relative change, dropping to zero": replace(DEFAULT_LOSS, drop=DropLoss.ZERO),
    "raw change": replace(DEFAULT_LOSS, layers=LayerScale.RAW),
}
"""Kinds of loss whose plans are compared: the two defaults, and each with one thing changed."""
BIT_CLASSES = (("q4_k", "q4_0"), ("int4_b64", "int4_b32"), ("q8_0",), ("int8_row",))
"""Forms of 4 and 8 bits that pruned models are stored in, preferred first; one target's each."""


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


def loss_variants(evidence: Evidence) -> list[Contender]:
    """The plain program's plan by each kind of loss that `LOSSES` names, as far as it is known."""
    problem = evidence.problem
    known = {
        name: kind
        for name, kind in LOSSES.items()
        if evidence.has_gradients or not kind.layers.needs_gradients
    }
    return [
        Contender(
            name,
            Kind.PLAN,
            solve(replace(problem, loss=evidence.tables(kind)), SOLVE_SECONDS).choice,
        )
        for name, kind in known.items()
    ]


def contenders(field: Field) -> tuple[list[Contender], list[str]]:
    """(every published method that fits the budget, a sentence for each that does not)."""
    missing: list[str] = []
    found = [*_one_type(field, missing), *_mixed_bits(field, missing)]
    for form in kept_forms(field.forms):
        label = form_label(field.forms[form])
        counts = counts_for(field.problem, form)
        reason = _cannot_prune(field, counts)
        if counts is None or reason:
            missing.append(f"Pruning, {label}: {reason}.")
            continue
        for name, kind, scores in _rankings(field.stats):
            kept = keep_largest(scores, counts, field.supers, field.problem.num_groups)
            found.append(Contender(f"{name}, {label}", kind, np.where(kept, form, 0)))
    return found, missing


def _rankings(stats: ExpertStats) -> Iterator[tuple[str, Kind, FloatArray]]:
    """(name, kind, [L, E] scores) of every criterion and every random draw."""
    for name in CRITERIA:
        if name != "random":
            yield name, Kind.PRUNE, saliency(stats, name)
    for seed in RANDOM_SEEDS:
        yield f"random, draw {seed + 1}", Kind.RANDOM, random_scores(stats, seed)


def kept_forms(forms: Sequence[str]) -> list[int]:
    """Positions of the forms that pruned models are kept in: 4 bits, 8 bits and the last one."""
    found = [
        next((list(forms).index(name) for name in names if name in forms), None)
        for names in BIT_CLASSES
    ]
    return [*(index for index in found if index is not None), len(forms) - 1]


def form_label(form: str) -> str:
    """`4 bits`; 16 for a form that loses nothing."""
    return f"{int(form_bits(form))} bits"


def counts_for(problem: Problem, form: int) -> IntArray | None:
    """[L] experts that every layer keeps in `form`, as many as the budget holds, or None.

    A group-limited router's groups keep equally many.
    """
    counts = np.minimum(problem.even_counts(form, problem.budget_bytes), problem.group_size)
    return None if counts.min() < problem.group_minimum else counts * problem.num_groups


def _cannot_prune(field: Field, counts: IntArray | None) -> str:
    """Why no criterion can keep `counts` [L] experts; empty where it can."""
    problem = field.problem
    if counts is None:
        needed = problem.group_minimum * problem.num_groups
        return f"fewer experts per layer fit than the router needs, {needed}"
    if counts.min() == problem.loss.shape[1]:
        return "all experts fit, none has to go"
    if (problem.group_bounds[0] * problem.num_groups > counts).any():
        return "a layer has more super experts than may stay"
    return ""


def _one_type(field: Field, missing: list[str]) -> Iterator[Contender]:
    """Every expert in the largest form that fits all of them, and all ternary."""
    problem = field.problem
    largest = problem.largest_single_form(problem.budget_bytes)
    fitting = range(1, largest + 1)
    ternary = [index for index in fitting if field.forms[index].startswith("tq")]
    if not any(form.startswith("tq") for form in field.forms):
        missing.append(
            "All ternary: not on offer for this model and target; a ternary block has 256 weights "
            "of a row."
        )
    for index in dict.fromkeys([*fitting[-1:], *ternary]):
        choice = np.full(problem.loss.shape[:2], index)
        yield Contender(f"all {field.forms[index]}", Kind.QUANTISE, choice)


def _mixed_bits(field: Field, missing: list[str]) -> Iterator[Contender]:
    """No expert dropped: our program, MC-MoE's and GEMQ's."""
    problem = field.problem
    kept = problem.only_forms(list(range(1, len(problem.form_bytes))), problem.budget_bytes)
    least_bytes = smallest_bytes(kept)
    if least_bytes is not None and least_bytes <= problem.budget_bytes:
        choice = solve(kept, SOLVE_SECONDS).choice
        yield Contender("edge-moe's program without dropping", Kind.MIXED, choice)
    else:
        missing.append("Mixed bits without dropping: the smallest form of every expert is larger.")
    programs = published_programs(problem, field.forms, field.stats, field.gradient_cost)
    for name, program in programs.items():
        if problem.scope != "expert":
            missing.append(f"{name}: needs a width per expert, which the target cannot hold.")
            continue
        try:
            yield Contender(name, Kind.MIXED, program(SOLVE_SECONDS).choice)
        except (BudgetError, StatsError, SolverError) as error:
            missing.append(f"{name}: {error}.")
