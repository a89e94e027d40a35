"""Every criterion worked out by hand from sums that are typed in: three experts, two tokens.

`test_saliency_by_hand` has the sums measured on a model.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_stats import make_info, random_stats

from edge_moe.errors import InputError
from edge_moe.saliency import (
    CRITERIA,
    keep_by_criterion,
    keep_largest,
    random_scores,
    saliency,
)
from edge_moe.stats import ExpertStats

# Expert 0 is chosen by both tokens, expert 1 by the second, expert 2 by none.
# token 0: g0 = 1.0, |f0| = 2, s = 0.5, p0 = 0.6;   raw logits 1, -1, 0
# token 1: g0 = 0.25, |f0| = 4, g1 = 0.75, |f1| = 8, s = 0.1, p0 = 0.2, p1 = 0.7; logits -4, -1, -2
SUMS: dict[str, list[float]] = {
    "gate": [1.25, 0.75, 0],
    "output_norm": [6, 8, 0],
    "output_square": [4 + 16, 64, 0],
    "gated_norm": [2 + 1, 6, 0],
    "gated_output_square": [4 + 4, 48, 0],
    "gated_square": [4 + 1, 36, 0],
    "shifted_norm": [0.5 * 2 + 0.1 * 1, 0.1 * 6, 0],
    "router_score": [0.8, 0.7, 0],
    "top_score": [0.6, 0.7, 0],
    "top_logit": [1, -1, 0],
}
BY_HAND: dict[str, list[float]] = {
    "frequency": [2, 1, 0],
    "weighted-frequency": [1.25, 0.75, 0],
    "ean": [6, 8, 0],
    "reap": [1.5, 6, 0],
    "man": [3, 8, 0],
    "msan": [10, 64, 0],
    "easy-ep": [1.1, 0.6, 0],
    "tcess-released": [0.5, -0.5, 0],
    "tcess": [0.3, 0.35, 0],
    "pmq": [1.0 * 0.4**1.5, 0.5 * 0.35**1.5, 0],
}


@pytest.fixture
def stats() -> ExpertStats:
    found = ExpertStats.zeros(make_info(moe_layer_ids=(0,), num_tokens=2))
    found.routed_tokens[:] = [[2, 1, 0]]
    for name, values in SUMS.items():
        found.expert_sums[name].add([values])
    return found


def test_every_criterion_is_checked() -> None:
    assert {*BY_HAND, "random"} == set(CRITERIA)


@pytest.mark.parametrize("name", BY_HAND)
def test_scores_are_those_worked_out_by_hand(name: str, stats: ExpertStats) -> None:
    np.testing.assert_allclose(saliency(stats, name), [BY_HAND[name]], rtol=1e-12)


@pytest.mark.parametrize("name", CRITERIA)
def test_shards_score_as_one_run_does(name: str) -> None:
    parts = [random_stats(window) for window in range(3)]
    forwards = parts[0].merge(parts[1]).merge(parts[2])
    backwards = parts[2].merge(parts[1].merge(parts[0]))
    np.testing.assert_array_equal(saliency(forwards, name), saliency(backwards, name))


def test_the_released_tcess_ranks_a_chosen_expert_below_an_unused_one(stats: ExpertStats) -> None:
    assert keep_largest(saliency(stats, "tcess-released"), 2).tolist() == [[True, False, True]]
    assert keep_largest(saliency(stats, "tcess"), 2).tolist() == [[True, True, False]]


def test_super_experts_are_kept_before_anything_is_ranked(stats: ExpertStats) -> None:
    assert keep_by_criterion(stats, "frequency", 1).tolist() == [[True, False, False]]
    stats.max_output[:] = [[1.0, 1.0, 500.0]]
    assert keep_by_criterion(stats, "frequency", 1).tolist() == [[False, False, True]]


def test_bad_requests(stats: ExpertStats) -> None:
    with pytest.raises(InputError, match="'reep' is unknown; known are frequency"):
        saliency(stats, "reep")
    for count in (0, 4):
        with pytest.raises(InputError, match=f"cannot keep {count} of 3"):
            keep_largest(np.ones((1, 3)), count)
    with pytest.raises(InputError, match="2 super experts, but only 1 may stay"):
        keep_largest(np.ones((1, 3)), 1, np.array([[True, True, False]]))


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6), st.integers(1, 6))
def test_what_is_kept_scores_at_least_what_is_not(values: list[float], count: int) -> None:
    scores = np.array([values])
    kept = keep_largest(scores, count)
    assert kept.sum() == count
    assert scores[kept].min() >= scores[~kept].max(initial=0.0)


def test_random_draws_differ_by_seed(stats: ExpertStats) -> None:
    assert (random_scores(stats, 0) != random_scores(stats, 1)).any()
    np.testing.assert_array_equal(random_scores(stats, 0), saliency(stats, "random"))
