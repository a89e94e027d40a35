"""The published mixed-precision programs: cases solved by hand, and brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe.errors import BudgetError, StatsError
from edge_moe.problem import FloatArray, IntArray, Problem
from edge_moe.programs import (
    PUBLISHED,
    RELEASED,
    BitForms,
    gemq,
    joint,
    pmq,
    pmq_cost,
    pmq_layer,
)

FORMS = ("drop", "tq1_0", "q2_k", "q3_k", "bf16")
SIZES = np.array([0, 17, 26, 34, 160])
BITS = BitForms.named(FORMS)


def problem_of(cost: FloatArray, budget_bytes: int) -> Problem:
    """`cost` [L, E, 5]; everything is allowed."""
    return Problem(cost, SIZES, np.ones(cost.shape, np.bool_), budget_bytes, top_k=1)


def with_other_forms(table: list[list[float]]) -> FloatArray:
    """[1, E, 5] from the costs of 1, 2 and 3 bits."""
    bits = np.array(table, np.float64)[None]
    return np.concatenate([2 * bits[..., :1], bits, 0 * bits[..., :1]], axis=-1)


def test_forms_are_found_by_name() -> None:
    assert BITS == BitForms((1, 2, 3), (1, 2, 3))
    assert BitForms.named(("drop", "q4_0", "q8_0"), {8: "q8_0", 4: "q4_0"}).bits == (4, 8)
    with pytest.raises(StatsError, match="2 bits are stored as q2_k"):
        BitForms.named(("drop", "tq1_0", "q3_k"))


def test_cost_of_pmq_by_hand() -> None:
    share, gate, loss = (
        np.array([[0.5, 0.25]]),
        np.array([[0.25, 1.0]]),
        np.array([[[16.0], [9.0]]]),
    )
    published = pmq_cost(share, gate, loss, PUBLISHED)
    np.testing.assert_allclose(published[0, :, 0], [0.5 * 0.125 * 16, 0.25 * 9])
    released = pmq_cost(share, gate, loss, RELEASED)
    np.testing.assert_allclose(released[0, :, 0], [0.5 * 0.125 * 4, 0.25 * 3])


def test_pmq_layer_by_hand() -> None:
    # three experts, 6 bits: 1+2+3 in some order, as 2+2+2 has no expert at 3 bits
    cost = np.array([[9.0, 5.0, 1.0], [4.0, 3.0, 2.5], [8.0, 2.0, 1.9]])
    assert pmq_layer(cost, (1, 2, 3), 6).tolist() == [2, 0, 1]
    assert pmq_layer(cost, (1, 2, 3), 8).tolist() == [2, 2, 1]  # 1 + 2.5 + 2
    with pytest.raises(ValueError, match="sums to 9"):
        pmq_layer(cost, (1, 2, 3), 9)  # 3+3+3 has no expert at 2 bits


def test_at_most_spends_no_bits_that_do_not_pay() -> None:
    cost = np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 2.0, 2.0], [1.0, 2.0, 2.0]])
    assert cost[np.arange(4), pmq_layer(cost, (1, 2, 3), 10)].sum() == 6.0
    found = pmq_layer(cost, (1, 2, 3), 10, at_most=True)
    assert found.tolist() == [1, 2, 0, 0]
    assert sum(found + 1) == 7


def test_pmq_takes_the_most_bits_that_fit() -> None:
    cost = with_other_forms([[9.0, 5.0, 1.0], [4.0, 3.0, 2.5], [8.0, 2.0, 1.9]])
    six, seven = 17 + 26 + 34, 26 + 26 + 34
    assert pmq(problem_of(cost, six), cost, BITS).choice.tolist() == [[3, 1, 2]]
    # 7 bits as 3+2+2 costs 1 + 3 + 2
    assert pmq(problem_of(cost, seven), cost, BITS).choice.tolist() == [[3, 2, 2]]
    assert pmq(problem_of(cost, 10_000), cost, BITS).choice.tolist() == [[3, 3, 2]]
    with pytest.raises(BudgetError) as caught:
        pmq(problem_of(cost, six - 1), cost, BITS)
    assert caught.value.minimum_bytes == six


def test_gemq_moves_bits_between_layers() -> None:
    light, heavy = [3.0, 2.0, 1.0], [300.0, 200.0, 100.0]
    cost = np.concatenate([with_other_forms([light] * 3), with_other_forms([heavy] * 3)])
    budget_bytes = 2 * 17 + 34 + 3 * 34
    found = gemq(problem_of(cost, budget_bytes), cost, BITS).choice
    assert sorted(found[0]) == [1, 1, 3]  # a high-bit expert in every layer
    assert found[1].tolist() == [3, 3, 3]
    free = gemq(problem_of(cost, 10_000), cost, BITS).choice
    assert (free == 3).all()
    with pytest.raises(BudgetError) as caught:
        gemq(problem_of(cost, 100), cost, BITS)
    assert caught.value.minimum_bytes == 2 * (17 + 17 + 34)


def test_joint_drops_where_that_is_cheapest() -> None:
    cost = with_other_forms([[9.0, 5.0, 1.0], [0.1, 0.1, 0.1], [8.0, 2.0, 1.9]])
    budget_bytes = 2 * 34
    assert joint(problem_of(cost, budget_bytes)).choice.tolist() == [[3, 0, 3]]
    other = cost.copy()
    other[0, 0] = 0.01
    found = joint(problem_of(cost, budget_bytes), other)
    assert found.choice[0, 0] == 0
    assert found.loss == pytest.approx(problem_of(cost, 0).loss_of(found.choice))


@st.composite
def tables(draw: st.DrawFn) -> tuple[FloatArray, int]:
    shape = (draw(st.integers(1, 2)), 3, 5)
    size = int(np.prod(shape))
    values = st.one_of(st.floats(1e-3, 1e3), st.integers(0, 4).map(float))
    cost = np.array(draw(st.lists(values, min_size=size, max_size=size))).reshape(shape)
    return cost, draw(st.integers(0, 3 * 34 * shape[0] + 5))


def legal(shape: tuple[int, ...]) -> list[IntArray]:
    every = product((1, 2, 3), repeat=shape[0] * shape[1])
    return [np.array(flat).reshape(shape[:2]) for flat in every]


def total(cost: FloatArray, choice: IntArray) -> float:
    return float(np.take_along_axis(cost, choice[..., None], axis=-1).sum())


@settings(max_examples=60, deadline=None)
@given(tables())
def test_gemq_is_the_best_there_is(table: tuple[FloatArray, int]) -> None:
    cost, budget_bytes = table
    problem = problem_of(cost, budget_bytes)
    fitting = [
        choice
        for choice in legal(cost.shape)
        if SIZES[choice].sum() <= budget_bytes and (choice == 3).any(axis=1).all()
    ]
    if not fitting:
        with pytest.raises(BudgetError):
            gemq(problem, cost, BITS)
        return
    found = gemq(problem, cost, BITS)
    assert found.expert_bytes <= budget_bytes
    assert (found.choice == 3).any(axis=1).all()
    assert found.loss == pytest.approx(min(total(cost, choice) for choice in fitting), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(tables(), st.booleans())
def test_pmq_is_the_best_of_every_layer(table: tuple[FloatArray, int], at_most: bool) -> None:
    cost, budget_bytes = table
    problem = problem_of(cost, budget_bytes)
    by_bits = {}
    for total_bits in range(6, 9):
        rows = []
        for layer in cost:
            fits = [
                choice
                for choice in product((1, 2, 3), repeat=3)
                if {2, 3} <= set(choice)
                and (sum(choice) <= total_bits if at_most else sum(choice) == total_bits)
            ]
            rows.append(min(sum(layer[range(3), choice]) for choice in fits))
        by_bits[total_bits] = sum(rows)
    try:
        found = pmq(problem, cost, BITS, at_most=at_most)
    except BudgetError as error:
        assert error.minimum_bytes > budget_bytes
        return
    assert found.expert_bytes <= budget_bytes
    bits = found.choice.sum(axis=1)
    if at_most:
        assert any(found.loss == pytest.approx(loss, rel=1e-6) for loss in by_bits.values())
    else:
        assert len(set(bits)) == 1
        assert found.loss == pytest.approx(by_bits[int(bits[0])], rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(3, 6), st.floats(0.0, 1.2))
def test_more_freedom_never_costs_more(
    seed: int, num_layers: int, num_experts: int, share: float
) -> None:
    """One table of costs, one budget: joint <= GEMQ <= PMQ.

    Every choice of PMQ has an expert of every layer in the highest width, as GEMQ asks, and the
    joint program allows every choice of GEMQ. The solvers may leave gaps of 1e-6.
    """
    generator = np.random.default_rng(seed)
    shape = num_layers, num_experts, len(FORMS)
    cost = np.sort(generator.lognormal(sigma=2.0, size=shape), axis=-1)[..., ::-1].copy()
    least, most = (SIZES[i] * num_layers * num_experts for i in (1, 3))
    extra = num_layers * (SIZES[2] + SIZES[3] - 2 * SIZES[1])  # one expert in every higher width
    problem = problem_of(cost, int(least + extra + share * (most - least - extra)))
    found = [joint(problem, cost), gemq(problem, cost, BITS), pmq(problem, cost, BITS)]
    assert all(each.expert_bytes <= problem.budget_bytes for each in found)
    assert (found[2].choice == BITS.forms[-1]).any(axis=1).all()
    losses = [total(cost, each.choice) for each in found]
    assert losses[0] <= losses[1] * (1 + 1e-5) and losses[1] <= losses[2] * (1 + 1e-5)
