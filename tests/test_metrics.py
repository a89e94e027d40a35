"""Metrics on logits small enough to work out by hand, and against scipy and torch."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe import metrics
from edge_moe.metrics import Estimate, TokenScores, compare, compare_tokens, paired_ratio, token_nll

FloatArray = npt.NDArray[np.float32]


def random_logits(seed: int, num_tokens: int, vocab_size: int) -> FloatArray:
    return np.random.default_rng(seed).normal(0, 3, (num_tokens, vocab_size)).astype(np.float32)


def assert_estimate(found: Estimate, value: float, error: float) -> None:
    assert found.value == pytest.approx(value)
    assert found.error == pytest.approx(error, abs=1e-12)


def test_perplexity_of_uniform_logits_is_the_vocabulary() -> None:
    nll = token_nll(np.zeros((5, 8), np.float32), [0, 1, 2, 3, 4])
    assert nll.shape == (4,)  # the first token is not scored
    assert_estimate(metrics.perplexity(nll), 8.0, 0.0)


def test_nll_scores_the_next_token() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1.0, 1.0, 1.0]]))
    assert token_nll(logits, [0, 1, 2]) == pytest.approx([-math.log(0.25), -math.log(0.7)])


def test_kld_by_hand() -> None:
    base = np.log(np.array([[0.5, 0.5], [0.5, 0.5]]))
    model = np.log(np.array([[0.75, 0.25], [0.75, 0.25]]))
    scores = compare_tokens(model, base, [0, 1])
    assert scores.kld == pytest.approx([0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)])
    assert scores.delta_p == pytest.approx([0.25 - 0.5])
    assert scores.nll - scores.base_nll == pytest.approx([math.log(2)])


def test_identical_logits_have_no_distance() -> None:
    logits = random_logits(0, 9, 20)
    found = compare(compare_tokens(logits, logits, list(range(9))))
    assert found.mean_kld == Estimate(0.0, 0.0)
    assert found.ppl_ratio == Estimate(1.0, 0.0)
    assert found.same_top_p == Estimate(1.0, 0.0)
    assert found.rms_delta_p == Estimate(0.0, 0.0)


def test_a_token_that_the_reference_excludes_adds_nothing() -> None:
    base = np.array([[0.0, -np.inf], [0.0, 0.0]])
    scores = compare_tokens(np.zeros((2, 2)), base, [0, 0])
    assert scores.kld == pytest.approx([math.log(2)])


def test_quantiles_rate_and_rms() -> None:
    kld = np.arange(101) / 100
    ones = np.ones(101)
    found = compare(TokenScores(ones, ones, kld, np.full(101, -0.1), np.arange(101) < 51))
    assert (found.median_kld, found.kld_90, found.kld_99) == pytest.approx((0.5, 0.9, 0.99))
    assert (found.kld_95, found.max_kld) == pytest.approx((0.95, 1.0))
    rate = 51 / 101
    assert found.same_top_p.value == pytest.approx(rate)
    assert found.same_top_p.error == pytest.approx(math.sqrt(rate * (1 - rate) / 100))
    assert_estimate(found.rms_delta_p, 0.1, 0.0)


def test_ratio_error_is_that_of_the_paired_difference() -> None:
    """llama-perplexity computes sqrt(var_Q + var_base - 2 cov) / sqrt(n - 1) instead."""
    rng = np.random.default_rng(3)
    base = rng.exponential(2, 500)
    model = base + rng.normal(0.1, 0.2, 500)
    zeros = np.zeros(500)
    found = compare(TokenScores(model, base, zeros, zeros, zeros == 0)).ln_ppl_ratio
    covariance = np.cov(model, base, ddof=0)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert found.value == pytest.approx(model.mean() - base.mean())
    assert found.error == pytest.approx(math.sqrt(variance / 499))


def test_perplexity_error_covers_the_truth() -> None:
    """One standard error around the estimate holds the true value about 68 % of the time."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        found = metrics.perplexity(rng.normal(2.0, 1.0, 300))
        hits += abs(found.value - math.exp(2.0)) < found.error
    assert 0.6 < hits / 400 < 0.76


def test_exact_match() -> None:
    found = metrics.exact_match([True, True, True, False])
    assert_estimate(found, 0.75, 0.2)  # 4/5 sqrt(3/64 + 1/64)
    assert f"{found:.2f}" == "0.75 ± 0.20"


@pytest.mark.parametrize("solved", [0, 20])
def test_twenty_equal_answers_are_not_certain(solved: int) -> None:
    found = metrics.exact_match([True] * solved + [False] * (20 - solved))
    assert_estimate(found, solved / 20, 1 / 42)  # 20/21 sqrt(1/1600)


@given(solved=st.integers(0, 500), missed=st.integers(1, 500))
def test_exact_match_spans_wilsons_interval(solved: int, missed: int) -> None:
    """Its ends are the shares p that lie one of their own standard errors from the one found."""
    count = solved + missed
    found = metrics.exact_match([True] * solved + [False] * missed)
    middle = (found.value + 1 / (2 * count)) / (1 + 1 / count)
    for share in (middle - found.error, middle + found.error):
        assert (found.value - share) ** 2 == pytest.approx(share * (1 - share) / count, abs=1e-12)


def test_no_problems_have_no_share() -> None:
    with pytest.raises(ValueError, match="no problems"):
        metrics.exact_match([])


def test_digits_follow_the_error() -> None:
    assert f"{Estimate(58.7649, 3.5512)}" == "58.8 ± 3.6"
    assert f"{Estimate(0.0001234, 0.0000211)}" == "0.000123 ± 0.000021"
    assert f"{Estimate(182.26, 11.3)}" == "182 ± 11"
    assert f"{Estimate(1.0, 0.0)}" == "1 ± 0"


def test_one_value_has_no_error_bar() -> None:
    with pytest.raises(ValueError, match="at least two values, found 1"):
        metrics.mean_and_error([1.0])


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="do not follow 3 tokens"):
        token_nll(np.zeros((2, 4)), [1, 2, 3])
    with pytest.raises(ValueError, match="differ in shape"):
        compare_tokens(np.zeros((2, 4)), np.zeros((2, 5)), [1, 2])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), num_tokens=st.integers(2, 12), vocab_size=st.integers(2, 40))
def test_against_scipy_and_torch(seed: int, num_tokens: int, vocab_size: int) -> None:
    import torch
    from scipy.special import log_softmax, rel_entr

    model, base = (random_logits(seed + shift, num_tokens, vocab_size) for shift in (0, 1))
    ids = np.random.default_rng(seed).integers(0, vocab_size, num_tokens).tolist()
    scores = compare_tokens(model, base, ids)
    log_p, base_log_p = (log_softmax(x.astype(np.float64), axis=-1)[:-1] for x in (model, base))
    expected = rel_entr(np.exp(base_log_p), np.exp(log_p)).sum(-1)
    assert scores.kld == pytest.approx(expected, abs=1e-12)
    loss = torch.nn.functional.cross_entropy(
        torch.tensor(model[:-1], dtype=torch.float64), torch.tensor(ids[1:]), reduction="none"
    )
    assert scores.nll == pytest.approx(loss.numpy(), abs=1e-12)
    assert (scores.is_same_top == (model[:-1].argmax(-1) == base[:-1].argmax(-1))).all()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = random_logits(5, 30, 16), random_logits(6, 30, 16)
    ids = list(range(15)) * 2
    whole = compare_tokens(model, base, ids)
    monkeypatch.setattr(metrics, "CHUNK_VALUES", 50)
    pieces = compare_tokens(model, base, ids)
    assert np.array_equal(whole.kld, pieces.kld)
    assert np.array_equal(token_nll(model, ids), pieces.nll)


def test_paired_ratio_by_hand() -> None:
    """Of 8 problems the base solves 6; 3 of those are solved, and one more."""
    base = [True] * 6 + [False] * 2
    found = paired_ratio([True] * 3 + [False] * 3 + [True, False], base)
    assert found.value == pytest.approx(4 / 6)
    assert found.error == pytest.approx(5 / 7 * math.sqrt(5 / (5 * 7)))
    same = paired_ratio(base, base)
    assert same.value == 1 and same.error == pytest.approx(1 / 7)
    none = paired_ratio([False] * 8, base)
    assert none.value == 0 and none.error == pytest.approx(1 / 7)
    for ours, its in (([True], [False]), ([], []), ([True], [True, True])):
        with pytest.raises(ValueError):
            paired_ratio(ours, its)


def test_error_of_a_paired_ratio_is_the_spread_of_many_draws() -> None:
    """The models agree more often than chance: taken as independent, the error would be 1.9 x."""
    generator = np.random.default_rng(0)
    draws = generator.choice(4, size=(4000, 400), p=[0.55, 0.1, 0.05, 0.3])
    ours, base = np.isin(draws, (0, 2)), np.isin(draws, (0, 1))
    found = [paired_ratio(*each) for each in zip(ours.tolist(), base.tolist(), strict=True)]
    spread = np.std([each.value for each in found])
    assert np.mean([each.error for each in found]) == pytest.approx(spread, rel=0.05)
