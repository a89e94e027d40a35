"""`solve`: the form of every expert that loses least within the byte budget.

With scope `expert` this is a multiple-choice knapsack: a Lagrangian relaxation finds a choice and a
bound, an integer program closes the gap between them. With scope `layer` or `model` the problem
falls apart by the count of kept experts, see `edge_moe.uniform`.
"""

from __future__ import annotations

import numpy as np

from edge_moe.errors import BudgetError
from edge_moe.integer_program import RELATIVE_GAP, solve_integer_program, useful_forms
from edge_moe.problem import BoolArray, FloatArray, IntArray, Problem, Solution, smallest_bytes
from edge_moe.relaxation import cheapest_price
from edge_moe.uniform import UniformFrontier

TIME_LIMIT_SECONDS = 60.0
_MAX_ROUNDING_REPAIRS = 3


def solve(problem: Problem, time_limit_seconds: float = TIME_LIMIT_SECONDS) -> Solution:
    """The least total loss within `problem.budget_bytes`, to a relative gap of 1e-6.

    Ties go to fewer bytes. A budget that holds every expert in its whole form takes that where
    nothing loses less, but smaller forms for experts that were measured to lose nothing in them.
    At the time limit the best choice so far is returned, with its gap.

    Raises:
        BudgetError: no choice fits; carries the fewest bytes that do.
        ValueError: no choice keeps the rules, whatever the budget.
    """
    least_bytes = smallest_bytes(problem)
    if least_bytes is None:
        raise ValueError("the rules of this problem contradict each other")
    if least_bytes > problem.budget_bytes:
        raise BudgetError(
            f"expert budget of {problem.budget_bytes} bytes cannot be met: "
            f"the smallest that can is {least_bytes} bytes",
            least_bytes,
        )
    if _whole_is_best(problem):
        return Solution.of(problem, _without_idle_bytes(problem))
    if problem.scope != "expert":
        return UniformFrontier(problem).best(problem.budget_bytes)
    return _solve_per_expert(problem, time_limit_seconds)


def _whole_is_best(problem: Problem) -> bool:
    """All experts in their whole form fit, as the scope allows, and none loses less in another."""
    whole = problem.whole_form
    fits = problem.bytes_of(whole) <= problem.budget_bytes
    lossless = (_loss_here(problem, whole) <= problem.loss.min(axis=-1)).all()
    shared = {"expert": whole, "layer": whole[:, :1], "model": whole[:1, :1]}[problem.scope]
    return bool(fits and lossless and problem.can_keep.all() and (whole == shared).all())


def _without_idle_bytes(problem: Problem) -> IntArray:
    """[L, E] the whole forms, or the smallest that lose no more and yet more would be lost without
    the expert: nothing is known of one that dropping costs nothing, so it stays whole."""
    whole = problem.whole_form
    least = _loss_here(problem, whole)[..., None]
    is_as_good = problem.allowed & (problem.loss <= least) & (problem.loss[..., :1] > least)
    axes = {"expert": (), "layer": (1,), "model": (0, 1)}[problem.scope]
    is_as_good &= is_as_good.all(axis=axes, keepdims=True)
    return np.where(is_as_good.any(axis=-1), is_as_good.argmax(axis=-1), whole)


def _solve_per_expert(problem: Problem, time_limit_seconds: float) -> Solution:
    priced = cheapest_price(problem, problem.budget_bytes)
    bound = priced.bound(problem.budget_bytes)
    known = fill_slack(problem, priced.choice)
    if problem.loss_of(known) > max(bound, 0.0):  # nothing loses less than nothing
        useful = useful_forms(problem, known, priced.price, bound)
        known, bound = _close_gap(problem, useful, known, bound, time_limit_seconds)
    loss = problem.loss_of(known)
    gap = max(0.0, 1 - bound / loss) if loss > 0 else 0.0
    choice = _release_useless(problem, known)
    return Solution.of(problem, choice, gap if gap > RELATIVE_GAP else 0.0)


def fill_slack(problem: Problem, choice: IntArray) -> IntArray:
    """Spend what the budget leaves: again and again the single change of form that wins most.

    Kept experts stay kept; without groups a dropped expert may come back.
    """
    choice = choice.copy()
    slack = problem.budget_bytes - problem.bytes_of(choice)
    changeable = problem.allowed.copy()
    changeable[..., 0] = False
    if problem.num_groups > 1:
        changeable &= (choice > 0)[..., None]
    while True:
        extra = problem.form_bytes - problem.form_bytes[choice][..., None]
        won = _loss_here(problem, choice)[..., None] - problem.loss
        won = np.where(changeable & (extra <= slack), won, 0.0)
        layer, expert, form = np.unravel_index(int(won.argmax()), won.shape)
        if won[layer, expert, form] <= 0.0:
            return choice
        slack -= int(extra[layer, expert, form])
        choice[layer, expert] = form


def _close_gap(
    problem: Problem,
    useful: BoolArray,
    known: IntArray,
    bound: float,
    time_limit_seconds: float,
) -> tuple[IntArray, float]:
    """(best choice [L, E], lower bound) after the integer program."""
    capacity_bytes = problem.budget_bytes
    known_loss = problem.loss_of(known)
    for attempt in range(_MAX_ROUNDING_REPAIRS):
        found, solver_bound = solve_integer_program(
            problem, useful, known_loss, capacity_bytes, time_limit_seconds
        )
        if attempt == 0:
            bound = max(bound, min(solver_bound, known_loss))
        if found is None:
            break
        over_bytes = problem.bytes_of(found) - problem.budget_bytes
        if over_bytes <= 0 and _keeps_the_rules(problem, found):
            return min(found, known, key=problem.loss_of), bound
        capacity_bytes -= max(over_bytes, 1)  # the solver used its tolerance: leave it none
    return known, bound


def _loss_here(problem: Problem, choice: IntArray) -> FloatArray:
    """[L, E] loss of every expert in its chosen form."""
    return np.take_along_axis(problem.loss, choice[..., None], axis=-1)[..., 0]


def _keeps_the_rules(problem: Problem, choice: IntArray) -> bool:
    counts = problem.by_group(choice > 0).sum(axis=-1)  # [L, G]
    least, most = problem.group_bounds
    same = (counts == counts[:, :1]).all()
    return bool(same and (counts[:, 0] >= least).all() and (counts[:, 0] <= most).all())


def _release_useless(problem: Problem, choice: IntArray) -> IntArray:
    """Drop kept experts whose dropping costs nothing, as far as the rules allow.

    The solver is indifferent to them; never-routed experts, whose loss is 0 in every form, are
    such. The highest expert ids go first.
    """
    kept = choice > 0
    nothing_lost = problem.loss[..., 0] <= _loss_here(problem, choice)
    useless = kept & problem.allowed[..., 0] & nothing_lost
    counts = problem.by_group(kept).sum(axis=-1)[:, 0]
    spare = np.minimum(
        problem.by_group(useless).sum(axis=-1).min(axis=-1), counts - problem.group_bounds[0]
    )
    from_the_end = np.cumsum(problem.by_group(useless)[..., ::-1], axis=-1)[..., ::-1]
    released = useless & (from_the_end <= spare[:, None, None]).reshape(useless.shape)
    remaining: IntArray = np.where(released, 0, choice)
    return remaining
