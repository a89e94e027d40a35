"""Eviction and admission on integers, worked out by hand."""

from __future__ import annotations

import pytest
from eviction import anything, filled
from hypothesis import given
from hypothesis import strategies as st

from edge_moe.runtime.policy import (
    AdmissionRule,
    Key,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    PagingStatistics,
    token_cycle_bytes,
)


def test_lru_evicts_the_oldest_use_or_arrival() -> None:
    policy = filled(LeastRecentlyUsed(), [(0, 0), (0, 1), (0, 2)])
    assert policy.victim(anything) == (0, 0)
    policy.use((0, 0))
    assert policy.victim(anything) == (0, 1)
    assert policy.victim(lambda key: key != (0, 1)) == (0, 2)
    policy.forget((0, 1))
    policy.admit((3, 3))
    assert policy.victim(lambda key: key[0] == 3) == (3, 3)
    assert policy.victim(lambda key: False) is None


def test_frequency_evicts_the_rarest_and_remembers_evicted_ones() -> None:
    policy = filled(LeastFrequentlyUsed(), [(0, 0), (0, 1), (0, 2)])
    for key in ((0, 0), (0, 0), (0, 1), (0, 2), (0, 2), (0, 2)):
        policy.use(key)
    assert policy.victim(anything) == (0, 1)
    assert policy.victim(lambda key: key != (0, 1)) == (0, 0)
    assert policy.victim(anything) == (0, 1)  # looking changes nothing
    policy.forget((0, 2))
    policy.admit((0, 2))
    policy.forget((0, 1))
    assert policy.victim(anything) == (0, 0)
    assert policy.victim(lambda key: False) is None


@given(st.lists(st.tuples(st.sampled_from("aufv"), st.integers(0, 5)), max_size=400))
def test_frequency_heap_agrees_with_a_plain_search(steps: list[tuple[str, int]]) -> None:
    """However often items go stale, the victim has the fewest uses, and is the latest of equals."""
    policy, uses, last, resident = LeastFrequentlyUsed(), [0] * 6, [0] * 6, set()
    for time, (step, row) in enumerate(steps, start=1):
        key = (0, row)
        if step == "a" and row not in resident:
            policy.admit(key)
            resident.add(row)
            last[row] = 0
        elif step == "u" and row in resident:
            policy.use(key)
            uses[row] += 1
            last[row] = time
        elif step == "f" and row in resident:
            policy.forget(key)
            resident.remove(row)
        others = resident - {row}
        found = policy.victim({(0, each) for each in others}.__contains__)
        best = min(others, key=lambda each: (uses[each], -last[each], each), default=None)
        assert found == (None if best is None else (0, best))


def test_below_one_token_cycle_lru_never_hits_and_frequency_does() -> None:
    """Three layers of one expert each, two slots: the cycle is one record too long."""
    hits = {}
    for policy in (LeastRecentlyUsed(), LeastFrequentlyUsed()):
        resident: set[Key] = set()
        count = 0
        for _ in range(10):
            for key in ((0, 0), (1, 0), (2, 0)):
                count += key in resident
                if key not in resident and len(resident) == 2:
                    victim = policy.victim(anything)
                    assert victim is not None
                    policy.forget(victim)
                    resident.remove(victim)
                if key not in resident:
                    policy.admit(key)
                    resident.add(key)
                policy.use(key)
        hits[policy.name] = count
    assert hits["lru"] == 0
    assert hits["frequency"] > 5


def test_token_cycle() -> None:
    assert token_cycle_bytes([100, 50], top_k=2) == 300


def test_admission_weighs_saved_time_against_a_busy_link() -> None:
    rule = AdmissionRule(bytes_per_second=1e6, precision={1: 0.5, 2: 0.1}, busy=1.0)
    # precision .5: saves .5 s, costs .5 s x busy 1: not more than it saves
    assert not rule.admits(1, 10**6, queued_bytes=0)
    rule.busy = 0.5
    assert rule.admits(1, 10**6, queued_bytes=0)
    assert not rule.admits(2, 10**6, queued_bytes=0)


def test_admission_asks_what_the_compute_of_a_layer_hides() -> None:
    rule = AdmissionRule(bytes_per_second=1e6, precision={1: 0.5}, busy=0.5)
    assert rule.admits(1, 10**6, queued_bytes=10**9)  # nobody knows yet
    rule.layer_seconds = 1.6
    # after a queue of 1 s, .6 s are hidden: .5 x .6 s against .5 x 1 s x .5
    assert rule.admits(1, 10**6, queued_bytes=10**6)
    assert not rule.admits(1, 10**6, queued_bytes=1_200_000)  # .4 s
    rule.busy, rule.layer_seconds = 0.0, 0.001
    assert rule.admits(1, 10**6, queued_bytes=0)  # costs nothing on an idle link
    assert not rule.admits(1, 10**6, queued_bytes=1001)


def test_admission_learns() -> None:
    rule = AdmissionRule(decay=0.5)
    rule.learn_precision(3, used=False)
    assert rule.precision[3] == pytest.approx(0.4)
    rule.learn_busy(1.0, 2.0)
    assert rule.busy == pytest.approx(0.25) and rule.layer_seconds == 1.0
    rule.learn_busy(0.0, 2.0)
    assert rule.layer_seconds == pytest.approx(1.5)
    rule.learn_transfer(100, 0.0)
    assert rule.bytes_per_second == 1e9


def test_hit_rate_without_uses_is_full() -> None:
    assert PagingStatistics().hit_rate == 1.0
    assert PagingStatistics(hits=3, misses=1).hit_rate == 0.75
