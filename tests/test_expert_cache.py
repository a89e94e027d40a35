"""Slots and cache: the byte budget is hard, pins hold, failures free their slot."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import BudgetError, InputError
from edge_moe.runtime.allotment import allot
from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.expert_store import ExpertStore, RecordInfo
from edge_moe.runtime.policy import EvictionPolicy, Key, LeastFrequentlyUsed, LeastRecentlyUsed
from edge_moe.runtime.slots import (
    SlotBuffers,
    allot_by_bytes,
    allot_by_count,
    size_classes,
    smallest_slot_bytes,
)

SIZES = (4, 8)


class MemoryStore(ExpertStore):
    """Expert (layer, row) is its own number, repeated; rows alternate between two sizes."""

    def __init__(self, num_layers: int = 2, num_rows: int = 4) -> None:
        self.kept = [list(range(num_rows)) for _ in range(num_layers)]
        self.reads = 0
        self.broken: set[Key] = set()

    def record(self, key: Key) -> RecordInfo:
        return RecordInfo("bf16", SIZES[key[1] % 2])

    def read_into(self, key: Key, buffer: memoryview) -> None:
        self.reads += 1
        if key in self.broken:
            raise OSError(f"cannot read {key}")
        buffer[:] = bytes([self.number(key)]) * len(buffer)

    def close(self) -> None:
        pass

    def number(self, key: Key) -> int:
        return 10 * key[0] + key[1]


def make_cache(store: MemoryStore, slots: dict[int, int]) -> ExpertCache:
    return ExpertCache(store, SlotBuffers(slots, torch.device("cpu")), LeastRecentlyUsed)


def read(cache: ExpertCache, store: MemoryStore, key: Key) -> None:
    """Acquire, check every byte, release."""
    assert set(cache.acquire(key).tolist()) == {store.number(key)}
    cache.release(key)


def test_hits_misses_and_evictions_are_counted() -> None:
    store = MemoryStore()
    cache = make_cache(store, {4: 1, 8: 1})
    for key in ((0, 0), (0, 0), (0, 2), (0, 1), (0, 0)):
        read(cache, store, key)
    statistics = cache.statistics
    assert (statistics.hits, statistics.misses, statistics.evictions) == (1, 4, 2)
    assert statistics.page_in_bytes == 4 + 4 + 8 + 4
    cache.check_integrity()


def test_filled_cache_never_reads_again() -> None:
    store = MemoryStore()
    cache = make_cache(store, {4: 4, 8: 4})
    cache.fill()
    for key in store.keys() * 3:
        read(cache, store, key)
    assert store.reads == 8
    assert cache.statistics.misses == 0


def test_pinned_experts_stay_and_prefetch_gives_up() -> None:
    store = MemoryStore()
    cache = make_cache(store, {4: 1, 8: 1})
    held = cache.acquire((0, 0))
    assert not cache.prefetch((0, 2), frozenset())
    assert set(held.tolist()) == {0}
    cache.release((0, 0))
    assert not cache.prefetch((0, 2), frozenset({(0, 0)}))
    assert cache.prefetch((0, 2), frozenset())
    assert cache.is_resident((0, 2)) and not cache.is_resident((0, 0))


def test_prefetched_bytes_are_useful_or_wasted() -> None:
    store = MemoryStore()
    cache = make_cache(store, {4: 1, 8: 2})
    cache.prefetch((0, 1), frozenset())
    read(cache, store, (0, 1))
    cache.prefetch((0, 3), frozenset())
    read(cache, store, (1, 1))
    read(cache, store, (1, 3))
    statistics = cache.statistics
    assert statistics.prefetch_issued_bytes == 16
    assert statistics.prefetch_useful_bytes == 8
    assert statistics.prefetch_wasted_bytes == 8


def test_failed_read_raises_and_frees_its_slot() -> None:
    store = MemoryStore()
    store.broken.add((0, 0))
    cache = make_cache(store, {4: 1, 8: 1})
    with pytest.raises(OSError, match="cannot read"):
        cache.acquire((0, 0))
    assert not cache.prefetch((0, 0), frozenset()) or not cache.is_resident((0, 0))
    store.broken.clear()
    read(cache, store, (0, 0))
    cache.check_integrity()


def test_threads_see_whole_experts() -> None:
    store = MemoryStore(num_layers=3, num_rows=6)
    cache = make_cache(store, {4: 2, 8: 2})
    keys, failures = store.keys(), []

    def work(start: int) -> None:
        try:
            for step in range(200):
                key = keys[(start + 7 * step) % len(keys)]
                if step % 3:
                    read(cache, store, key)
                else:
                    cache.prefetch(key, frozenset())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    cache.check_integrity()


LAYERS = st.lists(st.lists(st.sampled_from([8, 20, 36]), min_size=2, max_size=6), min_size=1)


@settings(deadline=None)
@given(layers=LAYERS, slot_bytes=st.integers(0, 600), top_k=st.integers(1, 2))
def test_slots_never_exceed_their_bytes(
    layers: list[list[int]], slot_bytes: int, top_k: int
) -> None:
    classes = size_classes(layers)
    needed = smallest_slot_bytes(classes, top_k)
    if slot_bytes < needed:
        with pytest.raises(BudgetError) as caught:
            allot_by_bytes(classes, slot_bytes, top_k)
        assert caught.value.minimum_bytes == needed
        return
    slots = allot_by_bytes(classes, slot_bytes, top_k)
    assert sum(size * count for size, count in slots.items()) <= slot_bytes
    for item in classes:
        assert min(top_k, item.most_in_a_layer) <= slots[item.record_bytes] <= item.num_experts
    if slot_bytes >= sum(map(sum, layers)):
        assert sum(slots.values()) == sum(map(len, layers))


def test_slots_by_count() -> None:
    classes = size_classes([[8, 8, 8], [8, 20, 20]])
    assert allot_by_count(classes, 2) == {8: 1, 20: 1}
    assert sum(allot_by_count(classes, 5).values()) == 5
    assert allot_by_count(classes, 100) == {8: 4, 20: 2}
    with pytest.raises(InputError, match="1 slots are fewer than the 2 sizes.*at least 2$"):
        allot_by_count(classes, 1)


def test_too_few_slots_are_told_how_many_are_enough(tiny_checkpoint: TinyCheckpoint) -> None:
    spec = Checkpoint(tiny_checkpoint("qwen3_moe")).spec  # top-2
    for sizes, fewest in (([[8, 8, 8, 8]] * 2, 2), ([[4, 8, 16, 32]] * 2, 4)):
        with pytest.raises(InputError, match=f"1 slots are fewer than .*at least {fewest}$"):
            allot(spec, sizes, [], None, 1)
        assert sum(allot(spec, sizes, [], None, fewest).counts.values()) == fewest


def test_an_interrupted_acquire_leaves_no_pin() -> None:
    store = MemoryStore()
    cache = make_cache(store, {4: 1, 8: 1})

    class Interrupted(MemoryStore):
        def read_into(self, key: Key, buffer: memoryview) -> None:
            raise KeyboardInterrupt

    cache._store = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        cache.acquire((0, 0))
    cache._store = store
    cache.check_integrity()
    read(cache, store, (0, 2))


@contextmanager
def interrupted_at(line: int) -> Iterator[None]:
    """Raises KeyboardInterrupt before the cache or its policy runs their `line`-th line."""
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if Path(frame.f_code.co_filename).name not in ("expert_cache.py", "policy.py"):
            return None
        left -= event == "line"
        if left == 0:
            raise KeyboardInterrupt  # Python stops tracing then
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def acquire(cache: ExpertCache, key: Key) -> Callable[[], object]:
    assert cache.acquire_beside(key, ()) is not None
    return partial(cache.release, key)


def claim(cache: ExpertCache, key: Key) -> Callable[[], object]:
    entry = cache.claim(key)
    return partial(cache.fill_claimed, key, entry) if entry is not None else lambda: None


def require_every_slot(cache: ExpertCache, store: MemoryStore, held: int) -> None:
    """All of a layer's experts, of which `held` of either size fit, are there at once."""
    for layer in (0, 1):
        keys = [(layer, row) for row in range(2 * held)]
        for key in keys:
            assert set(cache.acquire(key).tolist()) == {store.number(key)}
        for key in keys:
            cache.release(key)
        cache.check_integrity()


@pytest.mark.parametrize("policy", [LeastRecentlyUsed, LeastFrequentlyUsed])
@pytest.mark.parametrize("begin", [acquire, claim])
def test_an_interrupt_at_any_line_loses_no_slot(
    begin: Callable[[ExpertCache, Key], Callable[[], object]], policy: type[EvictionPolicy]
) -> None:
    """A hit, a slot that is free, and slots that others leave."""
    store, line, is_over = MemoryStore(num_rows=6), 0, False
    while not is_over:
        line += 1
        cache = ExpertCache(store, SlotBuffers({4: 3, 8: 3}, torch.device("cpu")), policy)
        for key in ((0, 0), (0, 2), (0, 4), (0, 1)):
            read(cache, store, key)
        ends: list[Callable[[], object]] = []
        try:
            with interrupted_at(line):
                for key in ((0, 0), (0, 3), (1, 0), (1, 2)):
                    ends.append(begin(cache, key))
            is_over = True
        except KeyboardInterrupt:
            cache.check_integrity()
        for end in ends:
            end()
        require_every_slot(cache, store, held=3)
    assert line > 50


def test_who_holds_an_expert_is_told_when_it_is_in_the_way() -> None:
    store = MemoryStore()
    cache = make_cache(store, {4: 2, 8: 1})
    first, second, third = (0, 0), (0, 2), (1, 0)
    held = [first]
    assert cache.acquire_beside(first, ()) is not None
    assert cache.acquire_beside(second, held) is not None  # a slot is free
    assert cache.acquire_beside(second, [first, second]) is not None  # it has one
    assert cache.acquire_beside(third, [first, second]) is None  # the least recently used is held
    assert cache.acquire_beside((0, 1), [first, second]) is not None  # of another size
    cache.release(first)
    assert cache.acquire_beside(third, [second]) is not None
    assert not cache.is_resident(first)
    for key in (second, second, third, (0, 1)):
        cache.release(key)
    cache.check_integrity()
