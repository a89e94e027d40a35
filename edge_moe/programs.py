"""Mixed-precision programs over tables of losses: two published ones and the joint one.

    pmq     MC-MoE (arXiv 2410.06270): every layer alone gets the same number of bits
    gemq    GEMQ (arXiv 2605.23078): one budget for all layers
    joint   ours: as gemq, and an expert may be dropped

All answer in the same terms, [L, E] positions among the forms of one `Problem` within its byte
budget, so their choices can be compared by the problem's own loss and built by the same code.

How each is solved: pmq by HiGHS, one integer program per layer and total of bits. gemq as joint
with dropping forbidden; where that leaves a layer without an expert in the highest width, HiGHS
solves all of it again with that rule. joint by `edge_moe.optimise.solve`: under scope `expert` a
Lagrangian relaxation gives a choice and a bound, and HiGHS closes the gap where there is one; under
scope `layer` or `model` an exact dynamic program (`edge_moe.uniform`), without HiGHS.

Nominal bits {1, 2, 3} are mapped to named forms, whose real bytes count. Published programs know
no protected experts: `Problem.allowed` is not asked. L layers, E experts, F forms, B bit widths.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edge_moe.errors import BudgetError, SolverError, StatsError
from edge_moe.integer_program import binary_program
from edge_moe.optimise import TIME_LIMIT_SECONDS, solve
from edge_moe.problem import FloatArray, IntArray, Problem, Solution
from edge_moe.units import format_bytes

BIT_FORMS = {1: "tq1_0", 2: "q2_k", 3: "q3_k"}
"""Nominal bits -> form."""
_OUT_OF_TIME = 1  # scipy's status of a run that met its time or iteration limit
_RELATIVE_GAP = 1e-9
_SCALED_COST = 1e4  # HiGHS stops at an absolute gap of 1e-6: this makes it 1e-10 of the cost


@dataclass(frozen=True)
class PmqExponents:
    """Exponents of PMQ's cost phi**routed_share * w**gate_mean * eps**error."""

    routed_share: float = 1.0
    gate_mean: float = 1.5
    error: float = 2.0


PUBLISHED = PmqExponents()
"""The paper's equation with the defaults of the released code, whose gamma it never uses."""
RELEASED = PmqExponents(error=1.0)
"""What the released code computes: it raises eps to alpha, which is meant for phi."""


@dataclass(frozen=True)
class BitForms:
    """The forms a program may choose from, ascending in bits."""

    bits: tuple[int, ...]
    forms: tuple[int, ...]
    """Position of each among the problem's forms."""

    @classmethod
    def named(cls, forms: Sequence[str], names: Mapping[int, str] = BIT_FORMS) -> BitForms:
        """Find `names` (bits -> form) among `forms`.

        Raises:
            StatsError: a form is not among them.
        """
        for width, name in names.items():
            if name not in forms:
                raise StatsError(
                    f"{width} bits are stored as {name}, which is not on offer for this model and "
                    f"target: its rows are no multiple of the form's block, or its loss was not "
                    f"measured; there are {', '.join(forms)}"
                )
        bits = tuple(sorted(names))
        return cls(bits, tuple(list(forms).index(names[each]) for each in bits))


def pmq_cost(
    routed_share: FloatArray,
    gate_mean: FloatArray,
    form_loss: FloatArray,
    exponents: PmqExponents = PUBLISHED,
) -> FloatArray:
    """[L, E, F] cost of MC-MoE's program.

    `routed_share` [L, E] phi, share of tokens that chose the expert; `gate_mean` [L, E] w, sum of
    the expert's router weights over all tokens / tokens (the released code takes softmax weights
    before they are renormalised); `form_loss` [L, E, F] squared change of the layer's output, whose
    root is eps, the Frobenius norm of the change. (The code sums norms of batches.)
    """
    weight = routed_share**exponents.routed_share * gate_mean**exponents.gate_mean
    cost: FloatArray = weight[..., None] * np.sqrt(form_loss) ** exponents.error
    return cost


def pmq(
    problem: Problem,
    cost: FloatArray,
    bit_forms: BitForms,
    *,
    at_most: bool = False,
    time_limit_seconds: float = TIME_LIMIT_SECONDS,
) -> Solution:
    """MC-MoE's program, with as many bits per layer as the byte budget holds.

    Every layer alone: least `cost` [L, E, F] with sum of bits = total (the released code asks for
    <=: `at_most`), and at least one expert in every width but the lowest. All layers get the same
    total; the paper states it as n * k, experts times mean bits.

    Raises:
        BudgetError: not even the smallest total fits.
        SolverError: HiGHS found no choice in time, which is for all layers together.
    """
    deadline = time.monotonic() + time_limit_seconds
    table, sizes = cost[..., bit_forms.forms], problem.form_bytes[list(bit_forms.forms)]
    lowest, highest = _total_range(bit_forms.bits, table.shape[1])
    taken_bytes = 0
    for total_bits in range(highest, lowest - 1, -1):
        least_bytes = _least_bytes(bit_forms.bits, sizes, table.shape, total_bits)
        if least_bytes > problem.budget_bytes and total_bits > lowest:
            continue
        rows = [
            pmq_layer(
                *(row, bit_forms.bits, total_bits),
                at_most=at_most,
                time_limit_seconds=deadline - time.monotonic(),
            )
            for row in table
        ]
        choice = np.array(bit_forms.forms)[np.array(rows)]
        taken_bytes = problem.bytes_of(choice)
        if taken_bytes <= problem.budget_bytes:
            return Solution.of(problem, choice)
    raise _too_small("PMQ", problem.budget_bytes, taken_bytes)


def pmq_layer(
    cost: FloatArray,
    bits: Sequence[int],
    total_bits: int,
    *,
    at_most: bool = False,
    time_limit_seconds: float = TIME_LIMIT_SECONDS,
) -> IntArray:
    """[E] position in `bits` of every expert of one layer; `cost` is [E, B].

    Raises:
        ValueError: no choice has that total.
        SolverError: HiGHS found no choice in time.
    """
    from scipy.optimize import LinearConstraint

    num_experts, num_bits = cost.shape
    spent = np.tile(np.asarray(bits, np.float64), num_experts)[None]
    used = np.tile(np.eye(num_bits)[1:], num_experts)  # [B - 1, E B]
    rows = [
        LinearConstraint(spent, -np.inf if at_most else total_bits, total_bits),
        LinearConstraint(used, 1, np.inf),
    ]
    found = _least_cost(cost, rows, time_limit_seconds)
    if found is None:
        raise ValueError(f"no choice of {num_experts} experts in {bits} bits sums to {total_bits}")
    return found


def gemq(
    problem: Problem,
    cost: FloatArray,
    bit_forms: BitForms,
    *,
    time_limit_seconds: float = TIME_LIMIT_SECONDS,
) -> Solution:
    """GEMQ's program: least total `cost` [L, E, F] within one byte budget over all layers.

    At least one expert of every layer is in the highest width. `cost` must be comparable across
    layers: `GradientStats.cost_table`. The paper counts nominal bits, this counts bytes.

    Raises:
        BudgetError: not even one high-bit expert per layer, the rest lowest, fits.
        SolverError: HiGHS found no choice in time.
    """
    forms = list(bit_forms.forms)
    sizes, num_layers = problem.form_bytes[forms], problem.num_layers
    num_experts = cost.shape[1]
    smallest = int(num_layers * ((num_experts - 1) * sizes[0] + sizes[-1]))
    if smallest > problem.budget_bytes:
        raise _too_small("GEMQ", problem.budget_bytes, smallest)
    allowed = np.zeros(problem.allowed.shape, np.bool_)
    allowed[..., forms] = True
    free_problem = replace(problem, loss=cost, allowed=allowed, scope="expert", num_groups=1)
    free = solve(free_problem, time_limit_seconds)
    if (free.choice == forms[-1]).any(axis=1).all():
        return Solution.of(problem, free.choice, free.gap)
    choice = _with_a_high_one(cost[..., forms], sizes, problem.budget_bytes, time_limit_seconds)
    return Solution.of(problem, np.array(forms)[choice])


def joint(problem: Problem, cost: FloatArray | None = None) -> Solution:
    """The planner's own program on `cost` (the problem's loss by default): dropping included."""
    if cost is None:
        return solve(problem)
    found = solve(replace(problem, loss=cost))
    return Solution.of(problem, found.choice, found.gap)


def _with_a_high_one(
    cost: FloatArray, sizes: IntArray, budget_bytes: int, time_limit_seconds: float
) -> IntArray:
    """[L, E] positions: least `cost` [L, E, B], one expert per layer at least in the last width."""
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_matrix

    num_layers, num_experts, num_bits = cost.shape
    columns = np.arange(cost.size).reshape(cost.shape)[..., -1]  # [L, E]
    layer = np.repeat(np.arange(num_layers), num_experts)
    high = csr_matrix((np.ones(columns.size), (layer, columns.flatten())), (num_layers, cost.size))
    taken = csr_matrix(np.tile(sizes / sizes[0], num_layers * num_experts)[None])
    capacity_bytes = budget_bytes
    while True:
        rows = [
            LinearConstraint(high, 1, np.inf),
            LinearConstraint(taken, -np.inf, capacity_bytes / sizes[0]),
        ]
        found = _least_cost(cost.reshape(-1, num_bits), rows, time_limit_seconds)
        if found is None:
            raise SolverError("HiGHS found no choice with one expert per layer in the most bits")
        over_bytes = int(sizes[found].sum()) - budget_bytes
        if over_bytes <= 0:
            return found.reshape(num_layers, num_experts)
        capacity_bytes -= over_bytes  # the solver used its tolerance: leave it none


def _least_cost(
    cost: FloatArray, rows: Sequence[Any], time_limit_seconds: float
) -> IntArray | None:
    """[N] position chosen for each of N experts with `cost` [N, B] under `rows`; None if none.

    Raises:
        SolverError: the time was over before one was found.
    """
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_matrix

    num_experts, num_bits = cost.shape
    expert = np.repeat(np.arange(num_experts), num_bits)
    once = csr_matrix((np.ones(cost.size), (expert, np.arange(cost.size))))
    deadline = time.monotonic() + time_limit_seconds
    found, known = None, float(cost.max())
    for _ in range(2):  # the second time on the scale of the optimum
        scaled = cost.flatten() * (_SCALED_COST / known if known > 0 else 1.0)
        constraints = [LinearConstraint(once, 1, 1), *rows]
        left_seconds = max(deadline - time.monotonic(), 0.0)
        result = binary_program(scaled, constraints, left_seconds, _RELATIVE_GAP)
        if result.x is None and found is None and result.status == _OUT_OF_TIME:
            raise SolverError(f"HiGHS found no choice in {time_limit_seconds:.3g} s")
        if result.x is None:
            return found
        found = np.asarray(result.x.reshape(cost.shape).argmax(axis=1), np.int64)
        known = float(np.take_along_axis(cost, found[:, None], axis=1).sum())
    return found


def _total_range(bits: Sequence[int], num_experts: int) -> tuple[int, int]:
    """Fewest and most bits of a layer that has an expert in every width but the lowest."""
    free = num_experts - len(bits) + 1
    if free < 0:
        raise ValueError(f"{num_experts} experts cannot take each of the widths {bits[1:]}")
    return sum(bits[1:]) + free * bits[0], sum(bits[1:]) + free * bits[-1]


def _least_bytes(
    bits: Sequence[int], sizes: IntArray, shape: tuple[int, ...], total_bits: int
) -> int:
    """No choice whose layers have `total_bits` each takes fewer bytes than this.

    Per expert: the lower convex hull of bytes over bits, at the mean number of bits.
    """
    mean = total_bits / shape[1]
    lines = [
        size + (mean - low) / (high - low) * (other - size)
        for low, size in zip(bits, sizes.tolist(), strict=True)
        for high, other in zip(bits, sizes.tolist(), strict=True)
        if low < high and low <= mean <= high
    ]
    return int(shape[0] * shape[1] * min(lines))


def _too_small(name: str, budget_bytes: int, smallest_bytes: int) -> BudgetError:
    return BudgetError(
        f"{name} cannot meet an expert budget of {format_bytes(budget_bytes)}: it drops no expert "
        f"and needs {format_bytes(smallest_bytes)}; raise the budget or use the joint program",
        smallest_bytes,
    )
