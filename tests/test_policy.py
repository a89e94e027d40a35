"""Eviction and admission on integers, worked out by hand."""

from __future__ import annotations

import pytest

from edge_moe.runtime.policy import (
    AdmissionRule,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    PagingStatistics,
    choose_policy,
    token_cycle_bytes,
)


def test_lru_evicts_the_oldest_use_and_what_was_never_used_first() -> None:
    policy = LeastRecentlyUsed()
    for key in ((0, 0), (0, 1), (0, 2), (0, 0)):
        policy.use(key)
    assert policy.choose([(0, 0), (0, 1), (0, 2)]) == (0, 1)
    assert policy.choose([(0, 0), (0, 2)]) == (0, 2)
    assert policy.choose([(0, 0), (3, 3)]) == (3, 3)
    policy.forget((0, 1))
    assert policy.choose([(0, 0), (0, 2)]) == (0, 2)


def test_frequency_evicts_the_rarest_and_remembers_evicted_ones() -> None:
    policy = LeastFrequentlyUsed()
    for key in ((0, 0), (0, 0), (0, 1), (0, 2), (0, 2), (0, 2)):
        policy.use(key)
    assert policy.choose([(0, 0), (0, 1), (0, 2)]) == (0, 1)
    policy.forget((0, 2))
    assert policy.choose([(0, 0), (0, 2)]) == (0, 0)


def test_below_one_token_cycle_lru_never_hits_and_frequency_does() -> None:
    """Three layers of one expert each, two slots: the cycle is one record too long."""
    hits = {}
    for policy in (LeastRecentlyUsed(), LeastFrequentlyUsed()):
        resident: set[tuple[int, int]] = set()
        count = 0
        for _ in range(10):
            for key in ((0, 0), (1, 0), (2, 0)):
                count += key in resident
                policy.use(key)
                if key not in resident and len(resident) == 2:
                    victim = policy.choose(resident)
                    policy.forget(victim)
                    resident.remove(victim)
                resident.add(key)
        hits[policy.name] = count
    assert hits["lru"] == 0
    assert hits["frequency"] > 5


def test_policy_is_chosen_by_the_token_cycle() -> None:
    cycle = token_cycle_bytes([100, 50], top_k=2)
    assert cycle == 300
    assert choose_policy(299, cycle).name == "frequency"
    assert choose_policy(300, cycle).name == "lru"


def test_admission_weighs_saved_time_against_a_busy_link() -> None:
    rule = AdmissionRule(bytes_per_second=1e6, precision={1: 0.5, 2: 0.1}, busy=1.0)
    # precision .5: saves .5 s, costs .5 s x busy 1: not more than it saves
    assert not rule.admits(1, 10**6, queued_bytes=0)
    rule.busy = 0.5
    assert rule.admits(1, 10**6, queued_bytes=0)
    assert not rule.admits(2, 10**6, queued_bytes=0)
    assert not rule.admits(1, 10**6, queued_bytes=10**6)


def test_admission_learns() -> None:
    rule = AdmissionRule(decay=0.5)
    rule.learn_precision(3, used=False)
    assert rule.precision[3] == pytest.approx(0.4)
    rule.learn_busy(1.0, 2.0)
    assert rule.busy == pytest.approx(0.25)
    rule.learn_transfer(100, 0.0)
    assert rule.bytes_per_second == 1e9


def test_hit_rate_without_uses_is_full() -> None:
    assert PagingStatistics().hit_rate == 1.0
    assert PagingStatistics(hits=3, misses=1).hit_rate == 0.75
