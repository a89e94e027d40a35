"""Fetched or computed on the CPU: the cheapest division, by hand and by its properties."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_moe.runtime.fetch_choice import Miss, MissChooser, Prices, split_misses
from edge_moe.runtime.interleaved_trial import InterleavedTrial

RATES = st.floats(1e3, 1e12)
PRICES = st.builds(
    lambda link, share, cpu, merge: Prices(link, link * share, cpu, merge),
    RATES,
    st.floats(0.1, 1.0),
    st.floats(1e-12, 1e-3),
    st.floats(0.0, 1.0),
)
MISSES = st.lists(
    st.builds(Miss, st.sampled_from([1000, 1500, 4000]), st.booleans()), min_size=1, max_size=7
)
MANY_SIZES = st.lists(
    st.builds(Miss, st.integers(1, 10**6), st.booleans()), min_size=9, max_size=16
)


def ten(num_misses: int) -> list[Miss]:
    return [Miss(10, is_in_ram=True)] * num_misses


def test_the_work_is_divided_so_that_both_sides_end_together() -> None:
    # fetching takes 1 s an expert, computing 3 s, merging 1 s
    prices = Prices(10.0, 10.0, 0.3, 1.0)
    assert split_misses(ten(1), prices).on_cpu == ()  # 1 s; on the CPU 4 s
    assert split_misses(ten(4), prices).on_cpu == ()  # 4 s; with one on the CPU max(3, 3) + 1
    split = split_misses(ten(8), prices)
    assert (split.on_cpu, split.seconds) == ((6, 7), 7.0)  # max(6, 6) + 1


def test_what_is_queued_and_what_lies_on_the_disk_count_on_the_link() -> None:
    prices = Prices(10.0, 10.0, 0.3, 0.0)
    assert split_misses(ten(1), prices).on_cpu == ()
    assert split_misses(ten(1), prices, queued_bytes=21).on_cpu == (0,)
    on_disk = Miss(10, is_in_ram=False)
    assert split_misses([on_disk] * 3, prices).on_cpu == ()
    assert split_misses([Miss(10, True), *[on_disk] * 3], prices).on_cpu == (0,)


def test_a_link_that_suffers_from_the_cpu_is_left_alone() -> None:
    assert split_misses(ten(3), Prices(10.0, 10.0, 0.2, 0.0)).on_cpu == (2,)
    assert split_misses(ten(3), Prices(10.0, 5.0, 0.2, 0.0)).on_cpu == ()


@given(MISSES | MANY_SIZES, PRICES, st.integers(0, 10**6))
def test_never_worse_than_all_fetched_or_all_computed(
    misses: list[Miss], prices: Prices, queued_bytes: int
) -> None:
    found = split_misses(misses, prices, queued_bytes)
    total = queued_bytes + sum(miss.num_bytes for miss in misses)
    possible = sum(miss.num_bytes for miss in misses if miss.is_in_ram)
    for cpu_bytes in (0, possible):
        assert found.seconds <= prices.seconds(cpu_bytes, total - cpu_bytes)
    assert all(misses[place].is_in_ram for place in found.on_cpu)


@given(MISSES, PRICES)
def test_few_sizes_are_divided_as_well_as_can_be(misses: list[Miss], prices: Prices) -> None:
    total = sum(miss.num_bytes for miss in misses)
    possible = [miss.num_bytes for miss in misses if miss.is_in_ram]
    least = min(
        prices.seconds(sum(chosen), total - sum(chosen))
        for count in range(len(possible) + 1)
        for chosen in combinations(possible, count)
    )
    assert split_misses(misses, prices).seconds == pytest.approx(least, rel=1e-12)


@given(MISSES | MANY_SIZES, PRICES, st.floats(1.0, 100.0))
def test_a_faster_link_costs_no_time(misses: list[Miss], prices: Prices, factor: float) -> None:
    faster = replace(
        prices,
        link_bytes_per_second=prices.link_bytes_per_second * factor,
        contended_bytes_per_second=prices.contended_bytes_per_second * factor,
    )
    before, after = split_misses(misses, prices), split_misses(misses, faster)
    assert after.seconds <= before.seconds


@given(st.integers(1, 12), PRICES, st.floats(1.0, 100.0))
def test_a_faster_link_fetches_no_less(count: int, prices: Prices, factor: float) -> None:
    faster = replace(
        prices,
        link_bytes_per_second=prices.link_bytes_per_second * factor,
        contended_bytes_per_second=prices.contended_bytes_per_second * factor,
    )
    misses = ten(count)
    slow, fast = split_misses(misses, prices), split_misses(misses, faster)
    assert len(fast.on_cpu) <= len(slow.on_cpu)


def test_those_missed_most_often_are_fetched() -> None:
    chooser = MissChooser(Prices(10.0, 10.0, 0.1, 0.0))
    miss = Miss(10, is_in_ram=True)
    chooser.choose([((0, 5), miss)])
    assert chooser.choose([((0, 1), miss), ((0, 5), miss)]) == ((0, 1),)


def test_a_trial_overrules_the_prices() -> None:
    trial = InterleavedTrial()
    chooser = MissChooser(Prices(1.0, 1.0, 1e-9, 0.0), trial)  # the CPU looks a lot faster
    misses = [((0, row), Miss(10, is_in_ram=True)) for row in range(3)]
    now = [0.0]
    with mock.patch("time.perf_counter", lambda: now[0]):
        while trial.verdict is None:
            trial.start_token()
            now[0] += 1.0 + 0.5 * bool(chooser.choose(misses))  # and is slower
            trial.end_token()
    assert trial.verdict is False and chooser.choose(misses) == ()
