"""The multiple-choice knapsack as an integer program for scipy's `milp` (HiGHS).

Only forms that can still improve on a known choice become variables; see `useful_forms`. At real
size, 48 layers x 128 experts x 7 forms with synthetic heavy-tailed losses, a plan takes 0.1-6 s of
one busy 2.x GHz core to a relative gap of 1e-6, for mean bits of 0.2 to 8 per weight; handing all
43,008 variables to HiGHS takes 3-22 s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_moe.native_output import native_stdout_to_stderr
from edge_moe.problem import BoolArray, FloatArray, IntArray, Problem

RELATIVE_GAP = 1e-6
_SCALED_LOSS = 1e4  # HiGHS stops at an absolute gap of 1e-6 too: this makes it 1e-10 of the loss


def useful_forms(problem: Problem, known: IntArray, price: float, bound: float) -> BoolArray:
    """[L, E, F] forms that can occur in a choice better than `known` [L, E], and those it uses.

    Left out are: forms that another kept form beats in bytes without losing more; forms whose own
    loss exceeds all of `known`'s; and kept forms whose loss + `price` * bytes exceeds the expert's
    cheapest by more than the gap to `bound`, the lower bound of the relaxation at `price`
    (reduced-cost fixing: swapping such a form for the cheapest shows that no better choice has it).
    """
    known_loss = problem.loss_of(known)
    useful = problem.allowed & ~_dominated(problem) & (problem.loss <= known_loss)
    cost = problem.loss + price * problem.form_bytes
    kept_cost = np.where(problem.allowed[..., 1:], cost[..., 1:], np.inf)
    cheapest = kept_cost.min(axis=-1, keepdims=True)
    cheapest = np.where(np.isfinite(cheapest), cheapest, 0.0)
    rounding = 1e-9 * (known_loss + price * problem.budget_bytes)
    useful[..., 1:] &= kept_cost - cheapest <= known_loss - bound + rounding
    taken = np.eye(problem.loss.shape[-1], dtype=np.bool_)[known]
    return np.asarray(useful | taken)


def solve_integer_program(
    problem: Problem,
    useful: BoolArray,
    known_loss: float,
    capacity_bytes: int,
    time_limit_seconds: float,
) -> tuple[IntArray | None, float]:
    """(choice [L, E] or None where HiGHS found none in time, its lower bound of the loss).

    The choice is rounded from HiGHS's solution, which may be off by its tolerance of 1e-6: the
    caller checks it.
    """
    from scipy.optimize import LinearConstraint  # 0.4 s to import: on demand

    variables = np.argwhere(useful)  # [N, 3] layer, expert, form
    scale = _SCALED_LOSS / known_loss
    unit = int(problem.form_bytes[1])
    experts, groups, sizes = _row_blocks(problem, variables)
    least, most = (np.repeat(side, problem.num_groups) for side in problem.group_bounds)
    constraints = [
        LinearConstraint(experts, 1, 1),
        LinearConstraint(groups, least, most),
        LinearConstraint(sizes / unit, -np.inf, capacity_bytes / unit),
    ]
    if problem.num_groups > 1:
        others = np.arange(len(least)) % problem.num_groups > 0
        first = np.arange(len(least)) // problem.num_groups * problem.num_groups
        constraints.append(LinearConstraint(groups[others] - groups[first[others]], 0, 0))
    costs = problem.loss[tuple(variables.T)] * scale
    result = binary_program(costs, constraints, time_limit_seconds, RELATIVE_GAP)
    bound = -np.inf if result.mip_dual_bound is None else result.mip_dual_bound / scale
    return None if result.x is None else _rounded(problem, variables, result.x), bound


def binary_program(
    costs: FloatArray, constraints: Sequence[Any], time_limit_seconds: float, relative_gap: float
) -> Any:
    """scipy's result of the least `costs` [N] . x over x in {0, 1}^N under linear `constraints`."""
    from scipy.optimize import Bounds, milp

    with native_stdout_to_stderr():
        return milp(
            costs,
            constraints=constraints,
            integrality=np.ones(len(costs)),
            bounds=Bounds(0, 1),
            options={"time_limit": time_limit_seconds, "mip_rel_gap": relative_gap},
        )


def _row_blocks(problem: Problem, variables: IntArray) -> tuple[Any, Any, Any]:
    """Sparse [L * E, N] forms of each expert, [L * G, N] kept of each group, [1, N] bytes."""
    from scipy.sparse import csr_matrix

    layer, expert, form = variables.T
    num_layers, num_experts = problem.allowed.shape[:2]
    ones, columns = np.ones(len(form)), np.arange(len(form))
    group = layer * problem.num_groups + expert // problem.group_size
    num_rows = num_layers * num_experts, num_layers * problem.num_groups
    return (
        csr_matrix((ones, (layer * num_experts + expert, columns)), (num_rows[0], len(form))),
        csr_matrix(((form > 0) * ones, (group, columns)), (num_rows[1], len(form))),
        csr_matrix(problem.form_bytes[form].astype(np.float64)[None]),
    )


def _dominated(problem: Problem) -> BoolArray:
    """[L, E, F] kept forms for which a smaller allowed kept form loses no more."""
    loss = np.where(problem.allowed, problem.loss, np.inf)
    best_so_far = np.minimum.accumulate(loss[..., 1:], axis=-1)
    dominated = np.zeros(problem.allowed.shape, np.bool_)
    dominated[..., 2:] = loss[..., 2:] >= best_so_far[..., :-1]
    return dominated


def _rounded(problem: Problem, variables: IntArray, values: FloatArray) -> IntArray:
    """[L, E] the form whose variable is largest."""
    table = np.full(problem.loss.shape, -1.0)
    table[tuple(variables.T)] = values
    choice: IntArray = table.argmax(axis=-1)
    return choice
