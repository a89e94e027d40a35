"""Other ways to spend the same expert bytes, and the best plan at other sizes.

Rivals obey the rules of the same target and protect the same experts, so they can be built and
measured beside the plan. Each is the best of its kind by the same loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_moe.optimise import solve
from edge_moe.plan import FrontierPoint, Rival
from edge_moe.problem import IntArray, Problem, Solution, smallest_bytes
from edge_moe.relaxation import cheapest_price
from edge_moe.saliency import keep_largest
from edge_moe.uniform import UniformFrontier
from edge_moe.units import format_bytes

FRONTIER_POINTS = 9
RANDOM_NAME = "random retention"
RANDOM_SEEDS = (0, 1, 2)
RIVAL_SECONDS = 15.0
"""Time limit of the integer program for one rival."""


def name_forms(choice: IntArray, forms: Sequence[str]) -> list[list[str]]:
    """[L, E] form indices -> names."""
    return [[forms[index] for index in row] for row in choice.tolist()]


def find_rivals(
    problem: Problem, forms: Sequence[str], expert_bytes: int
) -> tuple[list[Rival], list[str]]:
    """(rivals that exist at `expert_bytes`, a sentence for each that does not)."""
    solutions = _best_of_each_kind(problem, forms, expert_bytes)
    found = [
        _rival(name, solution, forms, note)
        for name, (solution, note) in solutions.items()
        if solution is not None
    ]
    draws = [random_retention(problem, expert_bytes, seed) for seed in RANDOM_SEEDS]
    drawn = [draw for draw in draws if draw is not None]
    if drawn:
        found.append(_random_rival(drawn, forms, whole_names(problem, forms)))
    present = {rival.name for rival in found}
    missing = [
        f"Rival {name!r} does not exist at {format_bytes(expert_bytes)} of experts: "
        "the least it may keep is larger."
        for name in (*solutions, RANDOM_NAME)
        if name not in present
    ]
    return found, missing


def _best_of_each_kind(
    problem: Problem, forms: Sequence[str], expert_bytes: int
) -> dict[str, tuple[Solution | None, str]]:
    """Rival's name -> (its best choice if one fits, note)."""
    widest = len(forms) - 1
    pruned = _best_of(problem.whole_or_dropped(expert_bytes))
    kept_forms = whole_names(problem, forms)
    found = {"prune only": (pruned, f"kept experts in {kept_forms}, the rest dropped")}
    if widest == 1:  # the target cannot quantise
        return found
    quantised = _best_of(problem.only_forms(list(range(1, widest + 1)), expert_bytes))
    found["quantise only"] = (quantised, "mixed bits, no expert dropped")
    single = "every expert in the largest single form that fits, super experts too"
    found["one type for all"] = (_one_form(problem, expert_bytes), single)
    return found


def random_retention(problem: Problem, expert_bytes: int, seed: int) -> Solution | None:
    """Whole experts in the last form, drawn at random, as many as fit; protected ones stay.

    Layers keep equal numbers; where the target allows it, the first layers keep what is left over.
    None where not even the smallest legal number fits.
    """
    whole = problem.whole_or_dropped(expert_bytes)
    least, most = whole.group_bounds
    one_each = problem.form_bytes[problem.whole_form[:, 0]]  # [L] bytes of one expert
    counts = np.minimum(np.maximum(_even_counts(problem, one_each, expert_bytes), least), most)
    if problem.scope != "expert":
        counts[:] = counts.max()
    needed_bytes = int((counts * one_each).sum()) * problem.num_groups
    if (counts > most).any() or needed_bytes > expert_bytes:
        return None
    order = np.random.default_rng(seed).random(problem.loss.shape[:2])
    num_groups = problem.num_groups
    kept = keep_largest(-order, counts * num_groups, whole.must_keep, num_groups)
    return Solution.of(problem, np.where(kept, problem.whole_form, 0))


def _even_counts(problem: Problem, one_each: IntArray, num_bytes: int) -> IntArray:
    """[L] whole experts per router group of each layer, as many as `num_bytes` pay for."""
    if (one_each == one_each[0]).all():
        return problem.even_counts(int(problem.whole_form[0, 0]), num_bytes)
    per_group = num_bytes // (int(one_each.sum()) * problem.num_groups)
    return np.full(problem.num_layers, per_group, np.int64)


def find_frontier(problem: Problem, fixed_bytes: int, plan: Solution) -> list[FrontierPoint]:
    """The least loss at about nine sizes from the smallest possible to all experts whole.

    Every point is the exact optimum for its own bytes; the plan's own point is among them.
    """
    largest_bytes = problem.bytes_of(problem.whole_form)
    least_bytes = smallest_bytes(problem)
    if least_bytes is None:
        raise ValueError("the rules of this problem contradict each other")
    budgets = np.linspace(least_bytes, largest_bytes, FRONTIER_POINTS).astype(np.int64).tolist()
    points = {plan.expert_bytes: plan.loss}
    for expert_bytes, loss in _best_at(problem, budgets):
        points.setdefault(expert_bytes, loss)
    return [
        FrontierPoint(total_bytes=fixed_bytes + size, expert_bytes=size, loss=points[size])
        for size in sorted(points)
    ]


def _best_at(problem: Problem, budgets: Sequence[int]) -> list[tuple[int, float]]:
    """(expert bytes, loss) of an optimum within each budget, at no more than its bytes."""
    if problem.scope == "expert":
        priced = [cheapest_price(problem, budget) for budget in budgets]
        return [(point.expert_bytes, point.loss) for point in priced]
    uniform = UniformFrontier(problem)
    best = [uniform.best(budget) for budget in budgets]
    return [(point.expert_bytes, point.loss) for point in best]


def _best_of(part: Problem) -> Solution | None:
    """The best choice of a problem with fewer forms; None where none fits."""
    needed_bytes = smallest_bytes(part)
    if needed_bytes is None or needed_bytes > part.budget_bytes:
        return None
    return solve(part, RIVAL_SECONDS)


def _one_form(problem: Problem, expert_bytes: int) -> Solution | None:
    """Every expert in the largest form in which all of them fit."""
    form = problem.largest_single_form(expert_bytes)
    if not problem.form_allowed[:, form].all():  # a GGUF layer is not stored in more bits
        return None
    return Solution.of(problem, np.full(problem.loss.shape[:2], form)) if form else None


def _rival(name: str, solution: Solution, forms: Sequence[str], note: str) -> Rival:
    return Rival(
        name=name,
        expert_bytes=solution.expert_bytes,
        loss=solution.loss,
        forms=name_forms(solution.choice, forms),
        note=note,
    )


def whole_names(problem: Problem, forms: Sequence[str]) -> str:
    """The forms that whole experts have: one, or several where a GGUF's layers differ."""
    return ", ".join(forms[index] for index in np.unique(problem.whole_form))


def _random_rival(drawn: Sequence[Solution], forms: Sequence[str], whole: str) -> Rival:
    note = f"mean loss of {len(drawn)} draws of whole experts in {whole}; forms of the first"
    rival = _rival(RANDOM_NAME, drawn[0], forms, note)
    return rival.model_copy(update={"loss": float(np.mean([draw.loss for draw in drawn]))})
