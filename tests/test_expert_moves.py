"""Moving single experts: which moves there are, and that measured moves find what tables miss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe.expert_moves import Move, local_problem, possible_moves, tune_experts
from edge_moe.problem import FloatArray, FormScope, IntArray, Problem
from edge_moe.trials import MAX_PASS_PROPOSALS, Change, OnShare, TimeUp, Trials


def problem(
    num_layers: int = 1,
    num_experts: int = 4,
    budget_bytes: int = 8,
    scope: FormScope = "expert",
    num_groups: int = 1,
) -> Problem:
    """Forms of 0, 1, 2 and 4 bytes, a loss of 1 / (1 + bytes) for everybody, top_k 2."""
    form_bytes = np.array([0, 1, 2, 4])
    shape = num_layers, num_experts, len(form_bytes)
    return Problem(
        loss=np.broadcast_to(1 / (1.0 + form_bytes), shape).copy(),
        form_bytes=form_bytes,
        allowed=np.ones(shape, np.bool_),
        budget_bytes=budget_bytes,
        top_k=2,
        num_groups=num_groups,
        top_groups=num_groups,
        scope=scope,
    )


def moves(of: Problem, *rows: list[int]) -> set[tuple[int, tuple[int, ...], int]]:
    return {(move.layer, move.experts, move.form) for move in possible_moves(of, np.array([*rows]))}


def test_every_expert_goes_one_allowed_form_up_and_down() -> None:
    of = problem()
    of.allowed[0, 2, 2] = False  # from 1 to 3 at once
    assert moves(of, [0, 3, 1, 2]) == {
        (0, (0,), 1),
        (0, (1,), 2),
        (0, (2,), 0),
        (0, (2,), 3),
        (0, (3,), 1),
        (0, (3,), 3),
    }


def test_protected_experts_and_the_last_top_k_are_not_dropped() -> None:
    of = problem()
    of.allowed[0, 0, 0] = False
    dropping = {move for move in moves(of, [1, 1, 1, 0]) if move[2] == 0}
    assert dropping == {(0, (1,), 0), (0, (2,), 0)}
    assert not {move for move in moves(of, [1, 1, 0, 0]) if move[2] == 0}


def test_groups_keep_their_numbers() -> None:
    of = problem(num_experts=8, num_groups=2)
    found = moves(of, [1, 1, 2, 0, 1, 1, 2, 0])
    assert found == {
        *((0, (expert,), 2) for expert in (0, 1, 4, 5)),
        *((0, (expert,), form) for expert in (2, 6) for form in (1, 3)),
    }


def test_where_a_layer_shares_a_form_its_kept_experts_move_together() -> None:
    found = moves(problem(2, scope="layer"), [2, 2, 2, 0], [1, 1, 1, 0])
    assert found == {
        *((0, (0, 1, 2), form) for form in (1, 3)),
        (1, (0, 1, 2), 2),
        *((layer, (expert,), 0) for layer in (0, 1) for expert in (0, 1, 2)),
        (0, (3,), 2),
        (1, (3,), 1),
    }
    of, choice = problem(2, scope="layer"), np.array([[2, 2, 2, 0], [1, 1, 1, 0]])
    equal = {(move.layer, move.experts, move.form) for move in possible_moves(of, choice, True)}
    assert equal == {*((0, (0, 1, 2), form) for form in (1, 3)), (1, (0, 1, 2), 2)}
    whole = moves(problem(2, scope="model"), [2, 2, 2, 0], [2, 2, 2, 0])
    assert {form for _, _, form in whole} == {0, 2}


def test_a_local_problem_holds_the_changes_and_nothing_else() -> None:
    of, choice = problem(), np.array([[2, 1, 1, 0]])
    changes = {
        Move(0, (0,), 1): Change(0.5, 0.02),
        Move(0, (0,), 3): Change(-0.2, 0.02),
        Move(0, (3,), 1): Change(-0.1, 0.02),
    }
    local = local_problem(of, choice, changes, 2.5)
    assert local.allowed.sum() == 4 + 3
    np.testing.assert_allclose(local.loss[0, 0], [0, 0.55 + 0.15, 0.15, 0], atol=1e-12)
    np.testing.assert_allclose(local.loss[0, 3], [0.05, 0, 0, 0], atol=1e-12)
    assert not local.loss[0, 1:3].any()


class Truth:
    """A loss that the problem knows nothing of, with a part that does not add up."""

    def __init__(self, of: Problem, seed: int, interaction: float = 0.0) -> None:
        random = np.random.default_rng(seed)
        steps = random.random(of.loss.shape)
        self._loss = steps[..., ::-1].cumsum(axis=-1)[..., ::-1]  # more bytes lose less
        self._interaction = interaction
        self.choices: list[IntArray] = []

    def of(self, choice: IntArray) -> float:
        alone = np.take_along_axis(self._loss, choice[..., None], axis=-1).sum()
        return float(alone + self._interaction * (choice == 0).sum() ** 2)

    def __call__(self, choices: Mapping[str, IntArray], on_run: OnShare) -> dict[str, FloatArray]:
        assert len(choices) <= MAX_PASS_PROPOSALS
        self.choices += choices.values()
        return {name: np.full(2, self.of(choice)) for name, choice in choices.items()}


def tuned(of: Problem, truth: Truth, start: list[list[int]]) -> tuple[float, IntArray]:
    trials = Trials(of, truth, seconds=300)
    trials.add({"start": np.array(start)})
    tune_experts(of, trials)
    return trials.best.kld, trials.best.choice


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_adds_up_is_no_better_anywhere_within_one_step(seed: int) -> None:
    of, start = problem(), np.array([[2, 2, 2, 2]])
    truth = Truth(of, seed)
    found, choice = tuned(of, truth, start.tolist())
    near = [start + np.array([steps]) for steps in product((-1, 0, 1), repeat=4)]
    assert found <= min(truth.of(each) for each in near if of.bytes_of(each) <= of.budget_bytes)
    assert of.bytes_of(choice) <= of.budget_bytes


def test_only_experts_that_moved_are_measured_again() -> None:
    of = problem(4, budget_bytes=32)
    truth = Truth(of, 1)
    trials = Trials(of, truth, seconds=300)
    trials.add({"start": np.full((4, 4), 2)})
    tune_experts(of, trials)
    rounds = {trial.name.partition(",")[2] for trial in trials.results[1:]}
    assert len(rounds) > 1, "the first round helped"
    proposals = len(trials.results)
    assert len(truth.choices) - proposals < 2 * 32, "two rounds of 32 moves each would be more"


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    scope=st.sampled_from(["expert", "layer", "model"]),
    kept=st.integers(2, 4),
)
def test_what_is_found_fits_keeps_the_rules_and_is_no_worse(
    seed: int, scope: FormScope, kept: int
) -> None:
    of = problem(2, budget_bytes=2 * kept, scope=scope)
    start = [[1] * kept + [0] * (4 - kept)] * 2
    truth = Truth(of, seed, interaction=0.1)
    found, choice = tuned(of, truth, start)
    assert found == truth.of(choice) <= truth.of(np.array(start))
    assert of.bytes_of(choice) <= of.budget_bytes
    counts = np.count_nonzero(choice, axis=1)
    assert counts.min() >= of.top_k
    if scope != "expert":
        assert len(set(counts.tolist())) == 1
        assert all(len(set(row[row > 0].tolist())) == 1 for row in choice)


def test_probes_cannot_become_the_plan() -> None:
    of = problem()
    truth = Truth(of, 0)
    trials = Trials(of, truth, seconds=300)
    trials.add({"start": np.array([[2, 2, 2, 2]])})
    tune_experts(of, trials)
    over = [choice for choice in truth.choices if of.bytes_of(choice) > of.budget_bytes]
    assert over, "one form up takes more than the budget, and is measured nevertheless"
    assert all(of.bytes_of(trial.choice) <= of.budget_bytes for trial in trials.results)


def test_without_time_for_a_pass_others_get_their_turn() -> None:
    of = replace(problem(4, budget_bytes=32), top_k=1)
    trials = Trials(of, Truth(of, 0), seconds=300)
    trials.add({"start": np.full((4, 4), 2)})
    assert not trials.is_cut_short
    trials.seconds_per_plan = 1e6  # as if measuring were slow
    tune_experts(of, trials)
    assert trials.is_cut_short
    assert [trial.name for trial in trials.results] == ["start"]


def test_without_time_for_all_moves_those_measured_count() -> None:
    class OnePass(Trials):
        @property
        def left_seconds(self) -> float:
            return 300.0 if len(self.results) < 2 and not probed else 1e-12

    probed: list[int] = []

    class Counted(Truth):
        def __call__(
            self, choices: Mapping[str, IntArray], on_run: OnShare
        ) -> dict[str, FloatArray]:
            if trials.results:
                probed.append(len(choices))
            return super().__call__(choices, on_run)

    of = replace(problem(4, budget_bytes=32), top_k=1)
    trials = OnePass(of, Counted(of, 0), seconds=300)
    trials.add({"start": np.full((4, 4), 2)})
    with pytest.raises(TimeUp):
        tune_experts(of, trials)
    assert probed[0] == MAX_PASS_PROPOSALS
