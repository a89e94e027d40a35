"""Slots and cache: the byte budget is hard, pins hold, failures free their slot."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from random import Random

import pytest
import torch
from conftest import TinyCheckpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_reading import acquire
from traced_lines import at_line

from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import BudgetError, InputError
from edge_moe.runtime.allotment import allot
from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.expert_store import ExpertStore, RecordInfo
from edge_moe.runtime.held_experts import held_groups
from edge_moe.runtime.next_use import SoonestNextUse
from edge_moe.runtime.policy import EvictionPolicy, Key, LeastFrequentlyUsed, LeastRecentlyUsed
from edge_moe.runtime.products import Member
from edge_moe.runtime.slots import (
    SlotBuffers,
    allot_by_bytes,
    allot_by_count,
    size_classes,
    smallest_slot_bytes,
)

SIZES = (4, 8)
BOOKKEEPING = ("expert_cache.py", "policy.py", "next_use.py")


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
    assert set(acquire(cache, key).tolist()) == {store.number(key)}
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
    held = acquire(cache, (0, 0))
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
        acquire(cache, (0, 0))
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
    class Interrupted(MemoryStore):
        def read_into(self, key: Key, buffer: memoryview) -> None:
            if not self.reads:
                self.reads += 1
                raise KeyboardInterrupt
            super().read_into(key, buffer)

    store = Interrupted()
    cache = make_cache(store, {4: 1, 8: 1})
    with pytest.raises(KeyboardInterrupt):
        acquire(cache, (0, 0))
    cache.check_integrity()
    read(cache, store, (0, 2))


def interrupt() -> None:
    raise KeyboardInterrupt


def begin(cache: ExpertCache, key: Key) -> Callable[[], object]:
    assert cache.begin_beside(key, ()) is not None

    def end() -> None:
        cache.wait_for([key])
        cache.release(key)

    return end


def claim(cache: ExpertCache, key: Key) -> Callable[[], object]:
    entry = cache.claim(key)
    return partial(cache.fill_claimed, key, entry) if entry is not None else lambda: None


def let_go(cache: ExpertCache) -> None:
    """Where it is traced, Python can be interrupted between a `with` block's end and its exit."""
    while cache._lock._is_owned():  # type: ignore[attr-defined]
        cache._lock.release()


def require_every_slot(cache: ExpertCache, store: MemoryStore, held: int) -> None:
    """All of a layer's experts, of which `held` of either size fit, are there at once."""
    for layer in (0, 1):
        keys = [(layer, row) for row in range(2 * held)]
        for key in keys:
            assert set(acquire(cache, key).tolist()) == {store.number(key)}
        for key in keys:
            cache.release(key)
        cache.check_integrity()


@pytest.mark.parametrize("policy", [LeastRecentlyUsed, LeastFrequentlyUsed, SoonestNextUse])
@pytest.mark.parametrize(("start", "num_readers"), [(begin, 0), (begin, 2), (claim, 0)])
def test_an_interrupt_at_any_line_loses_no_slot(
    start: Callable[[ExpertCache, Key], Callable[[], object]],
    num_readers: int,
    policy: type[EvictionPolicy],
) -> None:
    """A hit, a slot that is free, and slots that others leave."""
    store, line, is_over = MemoryStore(num_rows=6), 0, False
    while not is_over:
        line += 1
        buffers = SlotBuffers({4: 3, 8: 3}, torch.device("cpu"))
        cache = ExpertCache(store, buffers, policy, num_readers=num_readers)
        for key in ((0, 0), (0, 2), (0, 4), (0, 1)):
            read(cache, store, key)
        ends: list[Callable[[], object]] = []
        try:
            with at_line(line, BOOKKEEPING, interrupt):
                for key in ((0, 0), (0, 3), (1, 0), (1, 2)):
                    ends.append(start(cache, key))
            is_over = True
        except KeyboardInterrupt:
            let_go(cache)
            cache.check_integrity()
        for end in ends:
            end()
        require_every_slot(cache, store, held=3)
        cache.close()
    assert line > 50


def test_who_holds_an_expert_is_told_when_it_is_in_the_way() -> None:
    store = MemoryStore()
    cache = make_cache(store, {4: 2, 8: 1})
    first, second, third = (0, 0), (0, 2), (1, 0)
    held = [first]
    assert cache.begin_beside(first, ()) is not None
    assert cache.begin_beside(second, held) is not None  # a slot is free
    assert cache.begin_beside(second, [first, second]) is not None  # it has one
    assert cache.begin_beside(third, [first, second]) is None  # the least recently used is held
    assert cache.begin_beside((0, 1), [first, second]) is not None  # of another size
    cache.release(first)
    assert cache.begin_beside(third, [second]) is not None
    assert not cache.is_resident(first)
    for key in (second, second, third, (0, 1)):
        cache.release(key)
    cache.check_integrity()


class GatedStore(MemoryStore):
    """Reads end when they are let go on."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: set[Key] = set()
        self.changed = threading.Condition()
        self.gates = {key: threading.Event() for key in self.keys()}

    def read_into(self, key: Key, buffer: memoryview) -> None:
        with self.changed:
            self.begun.add(key)
            self.changed.notify_all()
        assert self.gates[key].wait(timeout=30)
        super().read_into(key, buffer)

    def require_begun(self, keys: set[Key]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.begun == keys, timeout=30)


@pytest.fixture
def gated() -> Iterator[tuple[GatedStore, ExpertCache]]:
    store = GatedStore()
    buffers = SlotBuffers({4: 2, 8: 1}, torch.device("cpu"))
    cache = ExpertCache(store, buffers, LeastRecentlyUsed, num_readers=2)
    yield store, cache
    for gate in store.gates.values():
        gate.set()
    cache.close()


def test_experts_are_read_side_by_side(gated: tuple[GatedStore, ExpertCache]) -> None:
    store, cache = gated
    first, second, third = (0, 0), (0, 2), (1, 0)
    assert cache.begin_beside(first, ()) is not None
    assert cache.begin_beside(second, [first]) is not None
    store.require_begun({first, second})
    assert cache.here([first, second]) == []
    assert cache.begin_beside(third, [first, second]) is None  # though none of them is there yet
    store.gates[second].set()
    cache.wait_for([second])
    assert cache.here([first, second]) == [second]
    assert set(cache.slot(second, cache._entries[second].slot).tolist()) == {store.number(second)}
    store.gates[first].set()
    cache.wait_for([first])
    cache.release_residents([first, second])
    statistics = cache.statistics
    assert (statistics.misses, statistics.page_in_bytes) == (2, 8)
    cache.check_integrity()


def test_what_a_reader_cannot_read_is_told_to_who_waits(
    gated: tuple[GatedStore, ExpertCache],
) -> None:
    store, cache = gated
    store.broken = {(0, 0)}
    for key in ((0, 0), (0, 2)):
        store.gates[key].set()
        assert cache.begin_beside(key, ()) is not None
    with pytest.raises(OSError, match="cannot read"):
        cache.wait_for([(0, 2), (0, 0)])
    cache.release_residents([(0, 0), (0, 2)])
    assert not cache.is_resident((0, 0)) and cache.is_resident((0, 2))
    cache.check_integrity()


def test_a_slot_is_not_given_away_while_a_reader_fills_it(
    gated: tuple[GatedStore, ExpertCache],
) -> None:
    """Whoever asked was stopped, and lets go of it."""
    store, cache = gated
    for row in (0, 2):
        assert cache.begin_beside((0, row), ()) is not None
    store.require_begun({(0, 0), (0, 2)})
    cache.release_residents([(0, 0), (0, 2)])
    assert not cache.prefetch((1, 0), frozenset())
    store.gates[0, 0].set()
    store.gates[1, 2].set()
    assert set(acquire(cache, (1, 2)).tolist()) == {12}
    assert not cache.is_resident((0, 0)) and cache.is_resident((0, 2))
    cache.release((1, 2))
    store.broken = {(0, 2)}
    store.gates[0, 2].set()
    cache.close()
    assert not cache.is_resident((0, 2))  # nobody was told: it leaves no failed entry
    cache.check_integrity()


def test_seconds_of_reads_at_the_same_time_count_once(
    gated: tuple[GatedStore, ExpertCache],
) -> None:
    store, cache = gated
    start = time.perf_counter()
    for row in (0, 2):
        assert cache.begin_beside((0, row), ()) is not None
    store.require_begun({(0, 0), (0, 2)})
    time.sleep(0.05)
    for row in (0, 2):
        store.gates[0, row].set()
    cache.wait_for([(0, 0), (0, 2)])
    assert 0.05 <= cache.statistics.page_in_seconds <= time.perf_counter() - start
    cache.release_residents([(0, 0), (0, 2)])


def test_failing_reads_never_share_a_slot() -> None:
    """Several fail at once, while what was read with them is let go of, and others read ahead."""

    class Failing(MemoryStore):
        is_down = False

        def read_into(self, key: Key, buffer: memoryview) -> None:
            time.sleep(1e-4)
            if self.is_down:
                raise OSError("no disk")
            super().read_into(key, buffer)

    store, random, is_over = Failing(num_layers=3, num_rows=12), Random(0), threading.Event()
    buffers = SlotBuffers({4: 4, 8: 4}, torch.device("cpu"))
    cache = ExpertCache(store, buffers, LeastRecentlyUsed, num_readers=4)

    def read_ahead() -> None:
        ahead = Random(1)
        while not is_over.is_set():
            cache.prefetch((ahead.randrange(3), ahead.randrange(12)), frozenset())

    thread = threading.Thread(target=read_ahead)
    thread.start()
    try:
        for step in range(1000):
            store.is_down = step // 5 % 2 == 1
            rows = sorted(random.sample(range(12), 4))
            members = [Member(row, place, place + 1) for place, row in enumerate(rows)]
            with suppress(OSError), closing(held_groups(cache, step % 3, members)) as groups:
                for group in groups:
                    group.wait_for(group.members)
            cache.check_integrity()
    finally:
        is_over.set()
        thread.join()
        cache.close()
