"""The search on a made-up model whose true loss is not the optimiser's."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from conftest import TinyCheckpoint
from fake_stats import fake_stats

from edge_moe.candidates import candidate_forms
from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import InputError, SolverError
from edge_moe.loss_table import LossKind, loss_table
from edge_moe.optimise import solve
from edge_moe.planner import build_problem
from edge_moe.problem import FloatArray, IntArray, Solution
from edge_moe.published import with_room_for_protected
from edge_moe.saliency import CRITERIA
from edge_moe.search import (
    MIXED_BITS,
    ONE_FORM,
    PLAN_NAME,
    ROUNDS,
    Evidence,
    _tune_layers,
    search,
)
from edge_moe.super_experts import find_super_experts
from edge_moe.trials import MeasuringFailed, OnShare, TimeUp, Trials


@pytest.fixture
def evidence(tiny_checkpoint: TinyCheckpoint) -> Evidence:
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe", wide=True))
    spec, stats = checkpoint.spec, fake_stats(checkpoint)
    for name in ("gate", "output_norm", "gated_norm"):
        noise = np.random.default_rng(len(name)).random(stats.routed_tokens.shape)
        stats.expert_sums[name].add(noise)
    forms = candidate_forms(spec, "native")
    supers = find_super_experts(stats.max_output)

    def tables(kind: LossKind) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return loss_table(stats, forms, "bf16", kind)

    whole = spec.num_experts * spec.num_moe_layers * spec.expert_weights * 2
    problem = build_problem(spec, forms, tables(LossKind()), supers, "native", whole // 6)
    return Evidence(problem, stats, supers, tables)


class Truth:
    """What the made-up model loses; `calls` counts passes and plans."""

    def __init__(self, evidence: Evidence, limit: int = 10**9) -> None:
        self._loss = evidence.tables(LossKind(drop_factor=4.0, prior_tokens=64.0)).copy()
        self._loss[0] *= 8  # the first layer matters more than the optimiser believes
        self._limit = limit
        self.measured: list[str] = []

    def layer_factors(self, *factors: float) -> None:
        """Make the layers matter so many times as much."""
        self._loss *= np.array(factors)[:, None, None]

    def __call__(self, choices: Mapping[str, IntArray], on_run: OnShare) -> dict[str, FloatArray]:
        if len(self.measured) >= self._limit:
            raise TimeUp
        self.measured += choices
        return {
            name: np.full(2, np.take_along_axis(self._loss, choice[..., None], axis=-1).sum())
            for name, choice in choices.items()
        }


def test_the_best_measured_plan_is_taken(evidence: Evidence) -> None:
    truth, first = Truth(evidence), solve(evidence.problem)
    best, record = search(evidence, first, truth, seconds=300)
    found = {trial.name: trial.kld for trial in record.trials}
    assert record.is_complete
    assert set(found) < set(truth.measured), "moves of single experts are measured, too"
    assert found[record.chosen] == min(found.values()) < found[PLAN_NAME]
    assert truth({"": best.choice}, print)[""].mean() == found[record.chosen]
    assert record.chosen.startswith("experts moved"), "the search learns what each expert is worth"
    assert best.expert_bytes <= evidence.problem.budget_bytes
    assert (best.choice[evidence.supers] > 0).all()
    criteria = {name.partition(",")[0] for name in found} & set(CRITERIA)
    assert len(criteria) > len(CRITERIA) / 2, "the rest propose what was measured already"
    assert MIXED_BITS in found or not (best.choice == 0).any()


def test_nothing_is_measured_beside_a_plan_that_loses_nothing(evidence: Evidence) -> None:
    truth = Truth(evidence)
    truth.layer_factors(0.0, 0.0)
    first = solve(evidence.problem)
    found, record = search(evidence, first, truth, 100)
    assert truth.measured == [PLAN_NAME] and record.is_complete
    assert np.array_equal(found.choice, first.choice)


def test_layers_that_matter_more_are_made_dearer(evidence: Evidence) -> None:
    truth = Truth(evidence)
    truth.layer_factors(1 / 8, 64)
    trials = Trials(evidence.problem, truth, seconds=300)
    trials.add({PLAN_NAME: solve(evidence.problem).choice})
    _tune_layers(evidence, trials)
    assert trials.best.kld < trials.results[0].kld
    weights = [float(weight) for weight in trials.best.name.split("layer weights ")[1].split()]
    assert weights[0] < weights[1]


def test_no_plan_is_measured_twice(evidence: Evidence) -> None:
    seen: set[bytes] = set()

    def measure(choices: Mapping[str, IntArray], on_run: OnShare) -> dict[str, FloatArray]:
        keys = {choice.astype(np.int16).tobytes() for choice in choices.values()}
        assert len(keys) == len(choices) and not keys & seen
        seen.update(keys)
        return dict.fromkeys(choices, np.ones(2))

    _, record = search(evidence, solve(evidence.problem), measure, seconds=300)
    assert len(record.trials) < len(seen), "moves of single experts are measured, too"
    assert record.chosen == PLAN_NAME, "of equals the plain program stays"


def test_a_search_out_of_time_keeps_what_it_has(evidence: Evidence) -> None:
    first = solve(evidence.problem)
    best, record = search(evidence, first, Truth(evidence, limit=1), seconds=300)
    assert not record.is_complete
    assert [trial.name for trial in record.trials] == [PLAN_NAME]
    np.testing.assert_array_equal(best.choice, first.choice)
    best, record = search(evidence, first, Truth(evidence, limit=0), seconds=300)
    assert record.trials == [] and record.chosen == PLAN_NAME
    np.testing.assert_array_equal(best.choice, first.choice)


class Failing(Truth):
    """Measures so many passes, then the disk is full."""

    def __init__(self, evidence: Evidence, num_passes: int) -> None:
        super().__init__(evidence)
        self._passes_left = num_passes

    def __call__(self, choices: Mapping[str, IntArray], on_run: OnShare) -> dict[str, FloatArray]:
        if not self._passes_left:
            raise MeasuringFailed("/data: the disk is full")
        self._passes_left -= 1
        return super().__call__(choices, on_run)


@pytest.mark.parametrize("num_passes", [0, 1, 2])
def test_a_search_that_cannot_go_on_keeps_what_it_has(evidence: Evidence, num_passes: int) -> None:
    first, truth = solve(evidence.problem), Failing(evidence, num_passes)
    best, record = search(evidence, first, truth, seconds=300)
    assert not record.is_complete and record.failure == "/data: the disk is full"
    assert [trial.name for trial in record.trials] == truth.measured
    assert record.early_end == "no more could be measured: /data: the disk is full"
    if num_passes < 2:
        np.testing.assert_array_equal(best.choice, first.choice)
    else:
        found = {trial.name: trial.kld for trial in record.trials}
        assert found[record.chosen] < found[PLAN_NAME]


def test_time_is_looked_at_between_passes(evidence: Evidence) -> None:
    def measure(choices: Mapping[str, IntArray], on_run: OnShare) -> dict[str, FloatArray]:
        return dict.fromkeys(choices, np.ones(2))

    shares: list[float] = []
    first = solve(evidence.problem)
    _, record = search(evidence, first, measure, seconds=1e-9, on_share=shares.append)
    assert not record.is_complete and record.limit_seconds == 1e-9
    assert len(record.trials) == 1
    with pytest.raises(InputError, match="--no-search"):
        search(evidence, first, measure, seconds=0)


def test_time_is_looked_at_within_a_pass(evidence: Evidence) -> None:
    def measure(choices: Mapping[str, IntArray], on_run: OnShare) -> dict[str, FloatArray]:
        on_run(0.5)
        time.sleep(0.02)
        on_run(1.0)  # a pass that is done counts, however late
        return dict.fromkeys(choices, np.ones(2))

    shares: list[float] = []
    first = solve(evidence.problem)
    _, record = search(evidence, first, measure, seconds=0.015, on_share=shares.append)
    assert not record.is_complete
    assert len(record.trials) == 1
    assert 0 < shares[0] < 1 == shares[1]


def test_a_published_program_proposes_with_protected_experts_raised(evidence: Evidence) -> None:
    problem = evidence.problem
    assert evidence.supers.any(), "the made-up statistics have super experts"
    smaller = with_room_for_protected(problem)
    assert smaller.budget_bytes < problem.budget_bytes
    proposed = solve(replace(smaller, allowed=np.ones_like(problem.allowed)))
    assert (proposed.choice < problem.lowest_form).any(), "it protects nobody by itself"

    def measure(choices: Mapping[str, IntArray], on_run: OnShare) -> dict[str, FloatArray]:
        return {name: np.full(2, float(name != "theirs")) for name in choices}

    def fails(seconds: float) -> Solution:
        raise SolverError("too slow")

    offered = replace(evidence, published={"slow": fails, "theirs": lambda seconds: proposed})
    rounds: dict[str, IntArray] = {}
    best, record = search(
        offered, solve(problem), measure, seconds=300, on_round=rounds.__setitem__
    )
    assert record.chosen == "theirs"
    np.testing.assert_array_equal(best.choice, np.maximum(proposed.choice, problem.lowest_form))
    assert list(rounds) == list(ROUNDS)
    np.testing.assert_array_equal(rounds["published programs"], best.choice)
    assert (rounds["kinds of loss"] != best.choice).any()


def test_one_form_for_all_is_proposed_where_everybody_may_take_it(evidence: Evidence) -> None:
    def measure(choices: Mapping[str, IntArray], on_run: OnShare) -> dict[str, FloatArray]:
        return {name: np.full(2, float(name != ONE_FORM)) for name in choices}

    free = replace(
        evidence, problem=replace(evidence.problem, allowed=np.ones_like(evidence.problem.allowed))
    )
    best, record = search(free, solve(free.problem), measure, seconds=300)
    assert record.chosen == ONE_FORM
    assert len(np.unique(best.choice)) == 1
    one_larger = int(best.choice[0, 0]) + 1
    larger = np.full_like(best.choice, one_larger)
    assert free.problem.bytes_of(larger) > free.problem.budget_bytes >= best.expert_bytes
    _, record = search(evidence, solve(evidence.problem), measure, seconds=300)
    assert record.chosen != ONE_FORM, "super experts may not be that small"
