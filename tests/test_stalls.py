"""Which misses are waited for, by hand, and bodies that come in while shadows compute."""

from __future__ import annotations

import threading
import time
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_reading import acquire
from test_expert_cache import SIZES, MemoryStore, make_cache
from test_transfer import Device

from edge_moe.errors import InputError
from edge_moe.runtime.body_reader import BodyReader
from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.next_use import SoonestNextUse
from edge_moe.runtime.policy import (
    EvictionPolicy,
    Key,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    PagingStatistics,
)
from edge_moe.runtime.slots import SlotBuffers
from edge_moe.runtime.stalls import Allowance, Miss, StallOptions, stall_cost


def misses(*weights: float, record_bytes: int = 10, layer: int = 0) -> list[Miss]:
    """Row 0 has the first weight."""
    return [Miss((layer, row), weight, record_bytes) for row, weight in enumerate(weights)]


def test_heaviest_misses_are_waited_for_first() -> None:
    allowance = Allowance(num_layers=1)
    assert allowance.grant(0, misses(0.1, 0.5, 0.3), 25) == [(0, 1), (0, 2)]
    allowance.start_token()
    assert allowance.grant(0, misses(0.4, 0.4, 0.2), 10) == [(0, 0)]  # of equals the first row
    allowance.start_token()
    assert allowance.grant(0, misses(0.1, -0.5), 10) == [(0, 1)]  # some routers have signs


def test_layers_share_the_allowance_and_hand_on_what_they_leave() -> None:
    """40 bytes over 4 layers: 10 each, and 10-byte records."""
    allowance = Allowance(num_layers=4)
    assert allowance.grant(0, misses(0.6, 0.4), 40) == [(0, 0)]
    assert allowance.grant(1, misses(layer=1), 40) == []
    assert allowance.grant(2, misses(0.6, 0.4, layer=2), 40) == [(2, 0), (2, 1)]
    assert allowance.grant(3, misses(0.6, 0.4, layer=3), 40) == [(3, 0)]
    allowance.start_token()
    assert allowance.grant(3, misses(0.6, 0.4, layer=3), 40) == [(3, 0), (3, 1)]


def test_less_than_a_record_is_saved_up() -> None:
    allowance = Allowance(num_layers=4)
    found = [allowance.grant(layer, misses(1.0, layer=layer), 20) for layer in range(4)]
    assert found == [[], [(1, 0)], [], [(3, 0)]]


@given(
    layers=st.lists(
        st.lists(st.tuples(st.floats(0, 1), st.integers(1, 50)), max_size=8), min_size=1, max_size=6
    ),
    bytes_per_token=st.floats(0, 500),
)
def test_never_more_than_the_allowance(
    layers: list[list[tuple[float, int]]], bytes_per_token: float
) -> None:
    allowance, spent = Allowance(len(layers)), 0
    for layer, each in enumerate(layers):
        found = [Miss((layer, row), *pair) for row, pair in enumerate(each)]
        granted = allowance.grant(layer, found, bytes_per_token)
        spent += sum(miss.record_bytes for miss in found if miss.key in granted)
        assert spent <= bytes_per_token * (layer + 1) / len(layers)
        left = [miss.weight for miss in found if miss.key not in granted]
        taken = [miss.weight for miss in found if miss.key in granted]
        assert not (left and taken) or min(taken) >= max(left)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sometimes",), "stall 'sometimes' is unknown: use exact, bounded, never"),
        (("never", 0.5), "bound nothing where stall is never"),
        (("bounded", 0.0), "0 seconds of waiting mean nothing"),
        (("bounded", float("nan")), "nan seconds"),
        (("bounded", 1.0, -2.0), "-2 bytes/s"),
    ],
)
def test_options_that_mean_nothing(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StallOptions(*arguments)  # type: ignore[arg-type]


def test_cost_by_hand() -> None:
    before = PagingStatistics(hits=10, misses=5, shadow_experts=2, shadow_weight=0.5)
    before.decoded_weight = 2.0
    now = PagingStatistics(hits=16, misses=7, shadow_experts=4, shadow_weight=1.0)
    now.decoded_weight, now.page_in_bytes, now.stall_seconds = 6.0, 800, 0.5
    cost = stall_cost(StallOptions("bounded", 0.25), before, now, num_tokens=4)
    assert (cost.hit_rate, cost.shadow_share, cost.shadow_experts_per_token) == (0.75, 0.125, 0.5)
    assert (cost.page_in_bytes_per_token, cost.stall_seconds_per_token) == (200, 0.125)
    assert (cost.mode, cost.allowed_seconds) == ("bounded", 0.25)


# -- the cache, while a shadow computes -----------------------------------------------------------


def as_misses(store: MemoryStore, *keys: Key) -> list[Miss]:
    return [Miss(key, 1.0, store.record(key).num_bytes) for key in keys]


def test_only_what_is_there_has_arrived() -> None:
    store = MemoryStore()
    cache = make_cache(store, {4: 1, 8: 1})
    acquire(cache, (0, 0))
    assert cache.arrived([(0, 0), (0, 1), (1, 2)]) == [(0, 0)]
    assert cache.claim((0, 2)) is None  # the only slot of its size is held
    cache.release((0, 0))
    assert (cache.statistics.hits, cache.statistics.misses) == (0, 1)  # looking is not using
    entry = cache.claim((0, 2))
    assert entry is not None
    assert cache.arrived([(0, 2)]) == []  # a slot, but nothing in it yet
    assert cache.claim((0, 2)) is None
    assert cache.fill_claimed((0, 2), entry) is None
    assert cache.arrived([(0, 0), (0, 2)]) == [(0, 2)]
    cache.check_integrity()


@pytest.mark.parametrize("at", ["admit", "use", "victim"])
@pytest.mark.parametrize("policy", [SoonestNextUse, LeastRecentlyUsed, LeastFrequentlyUsed])
def test_a_claim_that_is_interrupted_leaves_nothing(
    policy: type[EvictionPolicy], at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes after the policy did one thing, whatever it is."""
    store = MemoryStore()
    cache = ExpertCache(store, SlotBuffers({4: 1, 8: 1}, torch.device("cpu")), policy)
    acquire(cache, (0, 0))
    cache.release((0, 0))

    def interrupted(self: EvictionPolicy, *arguments: Any) -> None:
        known(self, *arguments)
        monkeypatch.undo()
        raise KeyboardInterrupt

    known = getattr(policy, at)
    monkeypatch.setattr(policy, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.claim((0, 2))
    cache.check_integrity()
    for key in ((0, 2), (0, 0), (0, 2)):  # each takes the other's slot
        acquire(cache, key)
        cache.release(key)
    assert cache.arrived([(0, 0), (0, 2)]) == [(0, 2)]
    cache.check_integrity()


def test_body_that_would_leave_first_is_not_read() -> None:
    """By frequency: three uses keep the slot until the other has four."""
    store = MemoryStore()
    buffers = SlotBuffers({4: 1, 8: 1}, torch.device("cpu"))
    cache = ExpertCache(store, buffers, LeastFrequentlyUsed)
    for _ in range(3):
        acquire(cache, (0, 0))
        cache.release((0, 0))
    assert [cache.claim((0, 2)) for _ in range(3)] == [None] * 3
    assert cache.arrived([(0, 0)]) == [(0, 0)]
    entry = cache.claim((0, 2))
    assert entry is not None
    cache.fill_claimed((0, 2), entry)
    assert cache.arrived([(0, 0), (0, 2)]) == [(0, 2)]
    assert cache.statistics.evictions == 1
    cache.check_integrity()


def test_repeatable_bodies_are_read_at_once() -> None:
    store = MemoryStore()
    cache = make_cache(store, {4: 2, 8: 2})
    reader = BodyReader(cache, 1e9, is_repeatable=True)
    reader.want(as_misses(store, (0, 0), (0, 1)))
    assert store.reads == 2
    assert sorted(cache.arrived([(0, 0), (0, 1)])) == [(0, 0), (0, 1)]
    reader.close()


@pytest.mark.parametrize("is_repeatable", [True, False])
def test_body_that_cannot_be_read_is_an_error_of_the_next_token(is_repeatable: bool) -> None:
    store = MemoryStore()
    store.broken = {(0, 0)}
    cache = make_cache(store, {4: 1, 8: 1})
    reader = BodyReader(cache, 1e9, is_repeatable=is_repeatable)
    reader.want(as_misses(store, (0, 0)))
    reader.close()
    with pytest.raises(OSError, match="cannot read"):
        reader.start_token()
    reader.start_token()  # said once
    cache.check_integrity()
    assert not cache.is_resident((0, 0))


def test_link_that_is_behind_by_a_token_is_given_no_more() -> None:
    """8-byte records at 100 bytes/s: 80 ms each, of a token's 100 ms."""
    store = MemoryStore(num_layers=4)
    cache = make_cache(store, {4: 4, 8: 4})
    gate = threading.Event()
    read = store.read_into

    def slow(key: Key, buffer: memoryview) -> None:
        gate.wait(10)
        read(key, buffer)

    store.read_into = slow  # type: ignore[method-assign]
    reader = BodyReader(cache, 100)
    reader.start_token()
    time.sleep(0.1)
    reader.start_token()
    reader.want(as_misses(store, (0, 1), (1, 1), (2, 1), (3, 1)))
    assert cache.statistics.prefetch_rejected >= 1
    assert cache.statistics.prefetch_issued_bytes >= 8
    gate.set()
    reader.close()
    cache.check_integrity()


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**16), slots=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_what_is_held_keeps_its_bytes_while_others_are_evicted(
    seed: int, slots: tuple[int, int]
) -> None:
    """The model's thread holds and looks; the other one replaces whatever it may."""
    import numpy as np

    class Slow(MemoryStore):
        def read_into(self, key: Key, buffer: memoryview) -> None:
            time.sleep(0.0002)
            super().read_into(key, buffer)

    store = Slow()
    cache = make_cache(store, dict(zip(SIZES, slots, strict=True)))
    reader = BodyReader(cache, 1e12)
    generator = np.random.default_rng(seed)
    num_held = 0
    for _ in range(150):
        reader.start_token()
        keys = [(int(generator.integers(2)), int(row)) for row in generator.permutation(4)[:2]]
        here = cache.arrived(keys)
        places = cache.acquire_residents(here)
        assert places is not None  # nothing evicts but `want`
        reader.want(as_misses(store, *(key for key in keys if key not in here)))
        for _ in range(2):
            for key, place in zip(here, places, strict=True):
                assert set(cache.slot(key, place).tolist()) == {store.number(key)}
            time.sleep(0.0003)
        cache.release_residents(here)
        num_held += len(here)
        cache.check_integrity()
    reader.close()
    cache.check_integrity()
    assert num_held > 0
    assert cache.statistics.stall_seconds == 0


def test_misses_have_one_remedy_at_a_time() -> None:
    never = StallOptions("never")
    assert (never.only_fetching("auto"), never.only_fetching("fetch")) == ("fetch", "fetch")
    with pytest.raises(InputError, match="leave out --misses cpu, or use --stall exact"):
        never.only_fetching("cpu")


def test_what_is_on_its_way_to_a_device_is_not_there_yet() -> None:
    """Acquiring it queues a copy and waits for nothing; a token that never waits leaves it."""
    device = Device(Random(0), slots=2)
    device.use((0, 0))
    assert device.cache.arrived([(0, 0)]) == []
    device.streams.run_all()
    assert device.cache.arrived([(0, 0)]) == [(0, 0)]
    entry = device.cache.claim((0, 2))
    assert entry is not None
    assert device.cache.fill_claimed((0, 2), entry) is None  # waits for the copy
    assert device.cache.arrived([(0, 2)]) == [(0, 2)]
    device.cache.check_integrity()
