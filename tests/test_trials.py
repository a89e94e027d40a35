"""Which measured plan is taken: one that is surely better, not one that was lucky."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from edge_moe.problem import FloatArray, IntArray, Problem
from edge_moe.trials import STANDARD_ERRORS, Change, OnShare, Trials

PROBLEM = Problem(
    loss=np.zeros((1, 3, 3)),
    form_bytes=np.array([0, 1, 2]),
    allowed=np.ones((1, 3, 3), np.bool_),
    budget_bytes=4,
    top_k=1,
)
FIRST = np.full(400, 0.1)


def trials_of(**token_kld: FloatArray) -> Trials:
    """Trials of plans that measure `token_kld`, told apart by their first expert's form."""
    names = list(token_kld)

    def measure(choices: Mapping[str, IntArray], on_run: OnShare) -> dict[str, FloatArray]:
        on_run(1.0)
        return {name: token_kld[name] for name in choices}

    trials = Trials(PROBLEM, measure, seconds=300)
    different = [np.array([[2, 1, 1]]), np.array([[1, 1, 1]]), np.array([[1, 0, 1]])]
    trials.add({names[0]: different[0]})
    trials.add(dict(zip(names[1:], different[1:], strict=False)))
    return trials


def test_a_change_is_a_mean_with_its_paired_error() -> None:
    before, after = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 3.0, 4.0])
    change = Change.between(before, after)
    assert change.mean == -0.25
    assert change.error == pytest.approx(np.array([-1, 0, 0, 0]).std() / 2)
    assert change.upper(2) == pytest.approx(-0.25 + 2 * change.error)


def test_one_token_decides_nothing() -> None:
    lucky = FIRST.copy()
    lucky[7] = -50.0  # the mean is far lower, and 399 tokens are as they were
    trials = trials_of(first=FIRST, lucky=lucky)
    assert trials.best.name == "first"
    assert min(trials.results, key=lambda trial: trial.kld).name == "lucky"


def test_what_is_better_everywhere_is_taken() -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, FIRST.size)
    trials = trials_of(first=FIRST, better=FIRST - 0.02 + noise)
    assert trials.best.name == "better"


def test_the_surest_of_a_pass_is_taken_and_then_better_ones() -> None:
    sure, lower = FIRST - 0.01, FIRST - 0.05
    lower[0] = 19.0  # mean -0.0025, and not sure of it
    assert trials_of(first=FIRST, lower=lower, sure=sure).best.name == "sure"
    lower = FIRST - 0.05
    lower[:2] = 0.5  # not as sure as the other one, and surely better than it
    assert Change.between(sure, lower).upper(STANDARD_ERRORS) < 0
    assert trials_of(first=FIRST, sure=sure, lower=lower).best.name == "lower"


def test_plans_over_budget_or_against_the_rules_are_not_measured() -> None:
    trials = trials_of(first=FIRST)
    PROBLEM.allowed[0, 0, 0] = False
    try:
        assert not trials.add({"over": np.array([[2, 2, 2]]), "barred": np.array([[0, 1, 1]])})
    finally:
        PROBLEM.allowed[0, 0, 0] = True
    assert [trial.name for trial in trials.results] == ["first"]
