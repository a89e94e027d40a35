"""Orders of eviction: worked out by hand, and what holds for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

import pytest
from eviction import anything, filled
from hypothesis import given
from hypothesis import strategies as st

from edge_moe.errors import InputError
from edge_moe.runtime.belady import Belady
from edge_moe.runtime.next_use import SoonestNextUse
from edge_moe.runtime.pinned import FrequencyPinned
from edge_moe.runtime.policies import DEFAULT_POLICY, POLICIES, policy_named
from edge_moe.runtime.policy import EvictionPolicy, Key

KEYS = [(layer, row) for layer in range(3) for row in range(4)]


def test_names() -> None:
    assert list(POLICIES) == ["next-use", "lru", "frequency", "pinned"]
    assert policy_named("next-use") is DEFAULT_POLICY is SoonestNextUse
    with pytest.raises(InputError, match="'clock' is unknown; known: next-use, lru"):
        policy_named("clock")


def test_next_use_of_strangers_is_the_layer_that_just_passed() -> None:
    """No shares yet: after layer 1 of 3 comes layer 2, then 0, and layer 1 last."""
    policy = filled(SoonestNextUse(), [(0, 0), (1, 0), (1, 1), (2, 0)])
    policy.use((1, 0))
    assert policy.victim(anything) == (1, 1)
    assert policy.victim(lambda key: key[0] != 1) == (0, 0)
    policy.forget((1, 1))
    assert policy.victim(lambda key: key != (0, 0)) == (2, 0)
    assert policy.victim(lambda key: False) is None


def test_next_use_weighs_shares_against_the_order_of_layers() -> None:
    """Two layers; p = 1 - .96^n after n uses in a row: gaps (1 / p - 1) x 2 of 47, 23 and 15."""
    policy = filled(SoonestNextUse(), [(0, 0), (0, 1), (1, 0)])
    for _ in range(3):
        policy.use((0, 0))
        policy.use((1, 0))
    policy.use((0, 1))
    # from layer 0: (0, 1) after 2 + 47 layers, (0, 0) after 2 + 16, (1, 0) after 1 + 15
    assert policy.victim(anything) == (0, 1)
    assert policy.victim(lambda key: key != (0, 1)) == (0, 0)
    policy.use((1, 0))
    # from layer 1: (1, 0) after 2 + 11, (0, 0) after 1 + 16
    assert policy.victim(lambda key: key != (0, 1)) == (0, 0)
    for _ in range(200):  # what is not used any more fades
        policy.use((0, 1))
        policy.use((1, 0))
    assert policy.victim(anything) == (0, 0)


def test_next_use_learns_what_follows_what() -> None:
    """Layer 0 of two chooses 0 1 0 1 0: 0 is the more frequent and the more recent, but 1 is due.

    Shares of all visits .112 and .074, of those after a visit that chose 0 .035 and .115: means of
    .074 and .095, gaps (1 / p - 1) x 2 of 25 and 19.
    """
    policy = filled(SoonestNextUse(), [(0, 0), (0, 1), (1, 0)])
    for row in (0, 1, 0, 1):
        policy.use((0, row))
        policy.use((1, 0))
    policy.use((0, 0))
    assert policy.victim(lambda key: key[0] == 0) == (0, 0)
    policy.admit((0, 40))  # more experts than it knew of: what was learnt stays
    assert policy.victim(lambda key: key in ((0, 0), (0, 1))) == (0, 0)
    policy.use((1, 0))
    policy.use((0, 1))
    assert policy.victim(lambda key: key in ((0, 0), (0, 1))) == (0, 1)


def test_next_use_remembers_who_left_and_knows_a_single_layer() -> None:
    policy = filled(SoonestNextUse(), [(0, 0), (0, 1), (0, 2)])
    for row in (0, 0, 0, 1, 1, 2):
        policy.use((0, row))
    policy.forget((0, 0))
    assert policy.victim(anything) == (0, 2)
    policy.admit((0, 0))
    assert policy.victim(lambda key: key != (0, 2)) == (0, 1)


def test_pinned_keeps_the_often_used_half() -> None:
    policy = filled(FrequencyPinned(), [(0, 0), (0, 1), (0, 2), (0, 3)])
    for row in (3, 3, 3, 2, 2, 1, 0):
        policy.use((0, row))
    assert policy.victim(anything) == (0, 2)  # after the first use 3 was pinned, and one of equals
    for row in (3, 2, 3, 3, 2, 2, 2, 1, 0, 1, 0):
        policy.use((0, row))
    assert policy.victim(anything) == (0, 1)  # 3 and 2 are pinned, however long ago
    assert policy.victim(lambda key: key[1] > 1) == (0, 3)
    policy.forget((0, 1))
    assert policy.victim(anything) == (0, 0)


def test_belady_by_hand() -> None:
    future = [(0, 0), (0, 1), (0, 2), (0, 0), (0, 1), (0, 0)]
    policy = filled(Belady(future), [(0, 0), (0, 1), (0, 3)])
    assert policy.victim(anything) == (0, 3)  # never used
    policy.forget((0, 3))
    assert policy.victim(anything) == (0, 1)
    policy.use((0, 0))
    policy.use((0, 1))
    assert policy.victim(anything) == (0, 1)  # at 4, (0, 0) at 3
    assert policy.victim(lambda key: key != (0, 1)) == (0, 0)
    assert policy.victim(lambda key: False) is None


def replayed_hits(policy: EvictionPolicy, uses: Sequence[Key], num_slots: int) -> int:
    resident: set[Key] = set()
    hits = 0
    for key in uses:
        hits += key in resident
        if key not in resident and len(resident) == num_slots:
            victim = policy.victim(anything)
            assert victim in resident
            policy.forget(victim)
            resident.remove(victim)
        if key not in resident:
            policy.admit(key)
            resident.add(key)
        policy.use(key)
    return hits


def most_hits(uses: Sequence[Key], num_slots: int) -> int:
    """By trying every victim."""

    @cache
    def best(time: int, resident: frozenset[Key]) -> int:
        if time == len(uses):
            return 0
        key = uses[time]
        if key in resident:
            return 1 + best(time + 1, resident)
        if len(resident) < num_slots:
            return best(time + 1, resident | {key})
        return max(best(time + 1, resident - {gone} | {key}) for gone in resident)

    return best(0, frozenset())


@given(st.lists(st.sampled_from(KEYS[:6]), max_size=14), st.integers(1, 4))
def test_belady_hits_as_often_as_can_be_and_nobody_more(uses: list[Key], num_slots: int) -> None:
    bound = most_hits(uses, num_slots)
    assert replayed_hits(Belady(uses), uses, num_slots) == bound
    for policy in POLICIES.values():
        assert replayed_hits(policy(), uses, num_slots) <= bound


@pytest.mark.parametrize("name", [*POLICIES, "belady"])
@given(st.lists(st.tuples(st.sampled_from("aufv"), st.sampled_from(KEYS)), max_size=300))
def test_victims_are_resident_and_allowed(name: str, steps: list[tuple[str, Key]]) -> None:
    resident: set[Key] = set()
    taken = []  # what really happens of the steps, so that Belady can be told
    for step, key in steps:
        if step == "a" and key not in resident:
            resident.add(key)
            taken.append((step, key))
        elif step == "f" and key in resident:
            resident.remove(key)
            taken.append((step, key))
        elif step == "u" and key in resident or step == "v":
            taken.append((step, key))
    uses = [key for step, key in taken if step == "u"]
    policy = Belady(uses) if name == "belady" else POLICIES[name]()
    resident.clear()
    for step, key in taken:
        if step == "a":
            policy.admit(key)
            resident.add(key)
        elif step == "f":
            policy.forget(key)
            resident.remove(key)
        elif step == "u":
            policy.use(key)
        allowed = resident - {key} if step == "v" else resident
        found = policy.victim(allowed.__contains__)
        assert (found in allowed) if allowed else (found is None)
        assert policy.victim(allowed.__contains__) == found  # looking changes nothing


def test_below_one_token_cycle_the_default_still_hits() -> None:
    """Three layers of one expert each, two slots: LRU evicts each just before it is needed."""
    uses = [key for _, key in itertools.product(range(10), [(0, 0), (1, 0), (2, 0)])]
    hits = {name: replayed_hits(policy(), uses, 2) for name, policy in POLICIES.items()}
    bound = replayed_hits(Belady(uses), uses, 2)
    assert hits["lru"] == 0
    assert bound / 2 < hits["next-use"] <= bound
