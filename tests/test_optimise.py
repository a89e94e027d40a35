"""The optimiser against brute force, against instances solved by hand, and at real size."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edge_moe.errors import BudgetError
from edge_moe.integer_program import useful_forms
from edge_moe.optimise import fill_slack, solve
from edge_moe.problem import IntArray, Problem, smallest_bytes
from edge_moe.relaxation import cheapest_price, choose_at_price
from edge_moe.uniform import UniformFrontier

QWEN3_30B_WEIGHTS = 3 * 2048 * 768
BITS = np.array([0, 1.6875, 2.625, 3.4375, 4.5, 8.5, 16])


def keeps_the_rules(problem: Problem, choice: IntArray) -> bool:
    """Every rule but the budget, written a second time and plainly."""
    counts = []
    for layer, row in enumerate(choice.tolist()):
        if not all(problem.allowed[layer, expert, form] for expert, form in enumerate(row)):
            return False
        used = {form for form in row if form}
        if problem.scope != "expert" and len(used) > 1:
            return False
        size = len(row) // problem.num_groups
        groups = [row[start : start + size] for start in range(0, len(row), size)]
        per_group = {sum(form > 0 for form in group) for group in groups}
        if len(per_group) > 1:
            return False
        count = per_group.pop()
        if count * problem.top_groups < problem.top_k:
            return False
        if problem.num_groups > 1 and count < min(2, size):
            return False
        counts.append(count)
    if problem.scope == "model" and len(set(choice[choice > 0].tolist())) > 1:
        return False
    return problem.scope == "expert" or len(set(counts)) == 1


def legal_choices(problem: Problem) -> list[IntArray]:
    num_layers, num_experts, num_forms = problem.loss.shape
    every = product(range(num_forms), repeat=num_layers * num_experts)
    tables = (np.array(flat).reshape(num_layers, num_experts) for flat in every)
    return [table for table in tables if keeps_the_rules(problem, table)]


@st.composite
def problems(draw: st.DrawFn, scopes: tuple[Any, ...] = ("expert", "layer", "model")) -> Problem:
    """Small enough to enumerate: at most 4096 choices."""
    num_layers, num_experts, num_forms = draw(
        st.sampled_from([(1, 4, 4), (1, 6, 3), (2, 2, 4), (2, 3, 4), (2, 4, 2), (3, 2, 4)])
    )
    shape = (num_layers, num_experts, num_forms)
    size = num_layers * num_experts * num_forms
    values = st.one_of(st.just(0.0), st.floats(1e-3, 1e3), st.integers(0, 4).map(float))
    loss = np.array(draw(st.lists(values, min_size=size, max_size=size))).reshape(shape)
    steps = draw(st.lists(st.integers(1, 9), min_size=num_forms - 1, max_size=num_forms - 1))
    form_bytes = np.cumsum([0, *steps]) * draw(st.sampled_from([1, 2, 54]))
    allowed = np.ones(shape, np.bool_)
    protected = st.integers(0, num_layers * num_experts - 1)
    for flat in draw(st.lists(protected, max_size=2)):
        lowest = draw(st.integers(1, num_forms - 1))
        allowed[flat // num_experts, flat % num_experts, :lowest] = False
    num_groups = draw(st.sampled_from([1, 2])) if num_experts in (4, 6) else 1
    top_groups = draw(st.integers(1, num_groups))
    top_k = draw(st.integers(1, top_groups * num_experts // num_groups))
    largest = int(form_bytes[-1]) * num_layers * num_experts
    budget_bytes = draw(st.integers(0, largest))
    scope = draw(st.sampled_from(scopes))
    return Problem(loss, form_bytes, allowed, budget_bytes, top_k, num_groups, top_groups, scope)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_choice_is_better_and_every_rule_holds(problem: Problem) -> None:
    legal = legal_choices(problem)
    fitting = [table for table in legal if problem.bytes_of(table) <= problem.budget_bytes]
    if not legal:
        with pytest.raises(ValueError, match="contradict"):
            solve(problem)
        return
    least_bytes = min(problem.bytes_of(table) for table in legal)
    assert smallest_bytes(problem) == least_bytes
    if not fitting:
        with pytest.raises(BudgetError) as caught:
            solve(problem)
        assert caught.value.minimum_bytes == least_bytes
        return
    found = solve(problem)
    assert keeps_the_rules(problem, found.choice)
    assert found.expert_bytes == problem.bytes_of(found.choice) <= problem.budget_bytes
    assert found.loss == pytest.approx(problem.loss_of(found.choice))
    best = min(problem.loss_of(table) for table in fitting)
    assert found.loss == pytest.approx(best, rel=2e-6, abs=1e-12)
    assert found.gap == 0.0
    assert (solve(problem).choice == found.choice).all()


def test_a_choice_that_loses_nothing_needs_no_solver() -> None:
    """The relaxation's bound may be a rounding below zero."""
    loss = np.zeros((2, 2, 4))
    loss[0, 0, 1] = 1.0
    problem = Problem(loss, np.array([0, 1, 3, 4]), np.ones_like(loss, np.bool_), 3, 1)
    found = solve(problem)
    assert found.loss == found.gap == 0.0 and found.expert_bytes <= 3


@settings(max_examples=60, deadline=None)
@given(problems(scopes=("expert",)), st.floats(0, 100))
def test_a_price_gives_the_optimum_of_its_own_bytes(problem: Problem, price: float) -> None:
    legal = legal_choices(problem)
    assume(legal)
    priced = choose_at_price(problem, price)
    assert keeps_the_rules(problem, priced.choice)
    within = [table for table in legal if problem.bytes_of(table) <= priced.expert_bytes]
    best = min(problem.loss_of(table) for table in within)
    assert priced.loss == pytest.approx(best, abs=1e-9)
    fitting = [table for table in legal if problem.bytes_of(table) <= problem.budget_bytes]
    if fitting:
        least = min(problem.loss_of(table) for table in fitting)
        assert priced.bound(problem.budget_bytes) <= least + 1e-6


@settings(max_examples=60, deadline=None)
@given(problems(scopes=("expert",)))
def test_no_better_choice_uses_a_form_that_was_ruled_out(problem: Problem) -> None:
    least_bytes = smallest_bytes(problem)
    assume(least_bytes is not None and least_bytes <= problem.budget_bytes)
    start = cheapest_price(problem, problem.budget_bytes)
    known = fill_slack(problem, start.choice)
    assert keeps_the_rules(problem, known)
    assert problem.bytes_of(known) <= problem.budget_bytes
    assert problem.loss_of(known) <= start.loss
    useful = useful_forms(problem, known, start.price, start.bound(problem.budget_bytes))
    narrowed = replace(problem, allowed=useful)
    fitting = [t for t in legal_choices(problem) if problem.bytes_of(t) <= problem.budget_bytes]
    best = min(problem.loss_of(table) for table in fitting)
    best_of_useful = min(
        problem.loss_of(table)
        for table in fitting
        if np.take_along_axis(narrowed.allowed, table[..., None], axis=-1).all()
    )
    assert best_of_useful == pytest.approx(best, abs=1e-12)


def two_by_three(budget_bytes: int, **changes: Any) -> Problem:
    """Forms drop / 2 bytes / 5 bytes; losses such that the answer is arithmetic."""
    loss = np.array(
        [
            [[10.0, 3.0, 0.0], [8.0, 1.0, 0.0], [1.0, 0.5, 0.0]],
            [[20.0, 9.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]],
        ]
    )
    arguments: dict[str, Any] = {
        "loss": loss,
        "form_bytes": np.array([0, 2, 5]),
        "allowed": np.ones(loss.shape, np.bool_),
        "budget_bytes": budget_bytes,
        "top_k": 1,
    }
    return Problem(**(arguments | changes))


def test_by_hand_per_expert() -> None:
    # 9 bytes: 5 for the expert that loses 20, then 2 + 2 for those that lose 10 and 8
    found = solve(two_by_three(9))
    assert found.choice.tolist() == [[1, 1, 0], [2, 0, 0]]
    assert (found.loss, found.expert_bytes) == (3 + 1 + 1 + 0 + 2 + 0, 9)


def test_by_hand_one_form_per_layer() -> None:
    # one expert per layer costs 4, 7 or 10 bytes; 7 buys whole bytes where 20 would become 9
    found = solve(two_by_three(7, scope="layer"))
    assert found.choice.tolist() == [[1, 0, 0], [2, 0, 0]]  # a tie: both win 7
    assert found.loss == (3 + 8 + 1) + (0 + 2 + 0)
    # 8 bytes can also hold two experts per layer at 2 bytes each: 3+1+1 + 9+1+0 = 15 > 14
    assert solve(two_by_three(8, scope="layer")).choice.tolist() == [[1, 0, 0], [2, 0, 0]]


def test_by_hand_one_form_for_the_model() -> None:
    # 10 bytes: one whole expert per layer (9 + 2 = 11) or two small ones (5 + 10 = 15)
    found = solve(two_by_three(10, scope="model"))
    assert found.choice.tolist() == [[2, 0, 0], [2, 0, 0]]
    assert found.loss == 11


def test_a_protected_expert_stays_in_its_allowed_forms() -> None:
    allowed = np.ones((2, 3, 3), np.bool_)
    allowed[1, 2, :2] = False  # the one that loses nothing must be whole
    found = solve(two_by_three(9, allowed=allowed))
    assert found.choice.tolist() == [[1, 0, 0], [1, 0, 2]]
    with pytest.raises(BudgetError) as caught:
        solve(two_by_three(6, allowed=allowed))
    assert caught.value.minimum_bytes == 7


def test_everything_whole_when_the_budget_holds_it() -> None:
    assert (solve(two_by_three(30)).choice == 2).all()


def test_whole_experts_shrink_where_nothing_is_lost() -> None:
    """Two experts are exact in two bytes, and one that is never chosen loses nothing anywhere."""
    loss = two_by_three(30).loss.copy()
    loss[0, 1, 1] = loss[1, 0, 1] = 0.0
    assert solve(two_by_three(30, loss=loss)).choice.tolist() == [[2, 1, 2], [1, 2, 2]]
    assert (solve(two_by_three(30, loss=loss, scope="layer")).choice == 2).all()
    loss[0, :, 1] = 0.0  # a whole layer
    found = solve(two_by_three(30, loss=loss, scope="layer"))
    assert found.choice.tolist() == [[1, 1, 1], [2, 2, 2]]
    assert (solve(two_by_three(30, loss=loss, scope="model")).choice == 2).all()


def test_experts_that_lose_nothing_take_no_bytes() -> None:
    found = solve(two_by_three(29))
    assert found.loss == 0.0
    assert found.choice.tolist() == [[2, 2, 2], [2, 2, 0]]
    # a uniform count must give up another expert, or a layer's bits: 1 beats 4.5 and 10
    uniform = solve(two_by_three(29, scope="layer"))
    assert uniform.choice.tolist() == [[2, 2, 0], [2, 2, 0]]


def test_groups_keep_the_same_number() -> None:
    loss = np.zeros((1, 4, 2))
    loss[0, :, 0] = [9.0, 8.0, 7.0, 1.0]
    problem = Problem(
        loss=np.tile(loss, (1, 2, 1)),  # experts 0-3 and 4-7 are the two groups
        form_bytes=np.array([0, 1]),
        allowed=np.ones((1, 8, 2), np.bool_),
        budget_bytes=5,
        top_k=2,
        num_groups=2,
        top_groups=1,
    )
    assert solve(problem).choice.tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]
    assert smallest_bytes(problem) == 4  # a group's score is the sum of its best two
    assert smallest_bytes(replace(problem, top_k=3)) == 6


def real_size(mean_bits: float, seed: int = 0, **changes: Any) -> Problem:
    """48 layers x 128 experts x 7 forms with heavy-tailed losses."""
    generator = np.random.default_rng(seed)
    drop_loss = np.exp(generator.normal(0, 2.5, (48, 128)) + generator.normal(0, 1, (48, 1)))
    shares = np.array([1.0, 0.3, 0.12, 0.03, 0.007, 4e-5, 0.0])
    noise = np.exp(generator.normal(0, 0.3, (48, 128, 7)))
    drop_loss[generator.random((48, 128)) < 0.05] = 0.0  # never routed
    budget_bytes = int(mean_bits * QWEN3_30B_WEIGHTS / 8 * 48 * 128)
    return Problem(
        loss=drop_loss[..., None] * shares * noise,
        form_bytes=(BITS * QWEN3_30B_WEIGHTS / 8).astype(np.int64),
        allowed=np.ones((48, 128, 7), np.bool_),
        budget_bytes=budget_bytes,
        top_k=8,
        **changes,
    )


@pytest.mark.slow
@pytest.mark.parametrize("mean_bits", [4.0, 1.0, 0.2])
@pytest.mark.parametrize("scope", ["expert", "layer", "model"])
def test_real_size_is_solved_in_time(scope: Any, mean_bits: float) -> None:
    problem = real_size(mean_bits, scope=scope)
    started = time.perf_counter()
    found = solve(problem)
    assert time.perf_counter() - started < 60
    assert found.gap == 0.0
    assert keeps_the_rules(problem, found.choice)
    assert found.expert_bytes <= problem.budget_bytes


@pytest.mark.slow
def test_real_size_with_groups() -> None:
    problem = real_size(2.0, num_groups=8, top_groups=4)
    started = time.perf_counter()
    found = solve(problem)
    assert time.perf_counter() - started < 60
    assert keeps_the_rules(problem, found.choice)
    assert found.gap < 1e-4


def test_the_time_limit_leaves_a_legal_choice_and_an_honest_gap(
    capfd: pytest.CaptureFixture[str],
) -> None:
    problem = real_size(1.0)
    found = solve(problem, time_limit_seconds=1e-3)
    assert keeps_the_rules(problem, found.choice)
    assert found.expert_bytes <= problem.budget_bytes
    assert 0.0 < found.gap < 1e-2
    assert capfd.readouterr().out == ""


def test_a_whole_frontier_from_one_table() -> None:
    problem = real_size(8.0, scope="layer")
    small = replace(problem, loss=problem.loss[:4, :16], allowed=problem.allowed[:4, :16], top_k=2)
    frontier = UniformFrontier(small)
    budgets = np.linspace(smallest_bytes(small) or 0, 64 * int(small.form_bytes[-1]), 12)
    found = [frontier.best(int(budget)) for budget in budgets]
    again = [solve(replace(small, budget_bytes=int(budget))) for budget in budgets]
    assert [one.loss for one in found] == pytest.approx([one.loss for one in again])
    losses = [one.loss for one in found]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0
