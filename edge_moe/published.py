"""The field's mixed-precision programs on this package's statistics, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from edge_moe.problem import FloatArray, Problem, Solution
from edge_moe.programs import BitForms, gemq, pmq, pmq_cost
from edge_moe.stats import ExpertStats

Program = Callable[[float], Solution]
"""Seconds it may take -> what it found."""
PMQ_NAME, GEMQ_NAME = "MC-MoE (PMQ), 1-3 bits", "GEMQ, 1-3 bits"
"""Published with bits {1, 2, 3}: they cannot spend more than about 21 % of 16-bit bytes."""


def published_programs(
    problem: Problem, forms: Sequence[str], stats: ExpertStats, gemq_cost: FloatArray | None
) -> dict[str, Program]:
    """Name -> the program with its own costs, for targets that hold a form per expert.

    `gemq_cost` [L, E, F] needs gradient statistics; without them there is no GEMQ. A program raises
    StatsError where its bit widths were not measured, BudgetError where they do not fit, and
    SolverError where its time was too short.
    """

    def run_pmq(seconds: float) -> Solution:
        cost, bit_forms = _pmq_cost(forms, stats), BitForms.named(forms)
        return pmq(problem, cost, bit_forms, time_limit_seconds=seconds)

    found: dict[str, Program] = {PMQ_NAME: run_pmq}
    if gemq_cost is not None:
        found[GEMQ_NAME] = lambda seconds: gemq(
            problem, gemq_cost, BitForms.named(forms), time_limit_seconds=seconds
        )
    return found


def with_room_for_protected(problem: Problem) -> Problem:
    """`problem` with fewer bytes, so that protected experts of any choice can be raised.

    Published programs know no protected experts. `problem.lowest_form` is what they are raised to.
    """
    reserved_bytes = problem.bytes_of(problem.lowest_form)
    return replace(problem, budget_bytes=problem.budget_bytes - reserved_bytes)


def _pmq_cost(forms: Sequence[str], stats: ExpertStats) -> FloatArray:
    """[L, E, F] MC-MoE's cost from the same statistics."""
    num_tokens = max(1, stats.info.num_tokens)
    measured = stats.form_loss.values()
    form_loss = np.zeros((*measured.shape[:2], len(forms)))
    for index, form in enumerate(forms):
        if form in stats.info.forms:
            form_loss[..., index] = measured[..., stats.form_index(form)]
    gate_mean = stats.expert_sums["router_score"].values() / num_tokens
    return pmq_cost(stats.routed_tokens / num_tokens, gate_mean, form_loss)
