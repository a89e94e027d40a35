"""Copies and kernels in queues of their own: every kernel finds the bytes it was launched for."""

from __future__ import annotations

from contextlib import closing
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_streams import SimulatedStreams
from slot_reading import acquire
from test_expert_cache import SIZES, MemoryStore

from edge_moe.budget import STAGING_BUFFERS
from edge_moe.errors import InputError
from edge_moe.runtime.allotment import host_slots, host_terms
from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.held_experts import held_groups
from edge_moe.runtime.host_tier import HostTier
from edge_moe.runtime.policy import Key, LeastRecentlyUsed, PagingStatistics
from edge_moe.runtime.products import Member
from edge_moe.runtime.slots import SlotBuffers
from edge_moe.runtime.streams import CudaStreams, Streams
from edge_moe.runtime.transfer import StagedTransfer

CPU = torch.device("cpu")


class Device:
    """An `ExpertCache` on a simulated device."""

    def __init__(
        self, random: Random, slots: int, host_cells: int | None = None, num_readers: int = 0
    ) -> None:
        self.store = MemoryStore(num_layers=2, num_rows=6)
        self.streams = SimulatedStreams(random)
        transfer = StagedTransfer(self.streams, max(SIZES))
        self.host = None
        if host_cells is not None:
            cells = dict.fromkeys(SIZES, host_cells)
            buffers = SlotBuffers(cells, CPU, self.streams.host_memory)
            self.host = HostTier(buffers, transfer.wait)
        self.buffers = SlotBuffers(dict.fromkeys(SIZES, slots), CPU)
        self.cache = ExpertCache(
            *(self.store, self.buffers, LeastRecentlyUsed),
            host=self.host,
            transfer=transfer,
            num_readers=num_readers,
        )
        self.kernels_run = 0

    def launch(self, key: Key, packed: torch.Tensor) -> None:
        """A kernel that reads the expert, whenever the device gets to it."""

        def kernel() -> None:
            assert set(packed.tolist()) == {self.store.number(key)}, key
            self.kernels_run += 1

        self.streams.launch(kernel)

    def use(self, key: Key) -> None:
        packed = acquire(self.cache, key)
        self.launch(key, packed)
        self.cache.release(key)

    def use_together(self, keys: list[Key]) -> bool:
        slots = self.cache.acquire_residents(keys)
        if slots is None:
            return False
        for key, slot in zip(keys, slots, strict=True):
            self.launch(key, self.cache.slot(key, slot))
        self.cache.release_residents(keys)
        return True

    def use_beside(self, layer: int, rows: list[int]) -> None:
        """As the model does: experts that are read side by side."""
        members = [Member(row, place, place + 1) for place, row in enumerate(rows)]
        with closing(held_groups(self.cache, layer, members)) as groups:
            for group in groups:
                absent = group.absent()
                for member in sorted(group.members, key=lambda member: member.row in absent):
                    group.wait_for([member])
                    self.launch((layer, member.row), group.packed(member))


KEYS = st.tuples(st.integers(0, 1), st.integers(0, 5))
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["use", "use", "together", "beside", "prefetch", "run", "fail"]), KEYS
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(
    steps=STEPS,
    seed=st.integers(0, 2**16),
    slots=st.integers(1, 3),
    host_cells=st.none() | st.integers(0, 4),
    is_filled=st.booleans(),
    num_readers=st.sampled_from([0, 2]),
)
def test_every_kernel_finds_its_expert_in_any_order_of_the_queues(
    steps: list[tuple[str, Key]],
    seed: int,
    slots: int,
    host_cells: int | None,
    is_filled: bool,
    num_readers: int,
) -> None:
    device = Device(Random(seed), slots, host_cells, num_readers)
    launched = 0
    if is_filled:
        device.cache.fill()
    for verb, key in steps:
        if verb == "use":
            device.use(key)
            launched += 1
        elif verb == "together":
            other = (key[0], (key[1] + 1) % 6)
            launched += 2 * device.use_together([key, other])
        elif verb == "beside":
            device.use_beside(key[0], list(range(key[1], 6)))
            launched += 6 - key[1]
        elif verb == "prefetch":
            device.cache.prefetch(key, frozenset())
        elif verb == "run":
            device.streams.run_some(8)
        else:
            device.store.broken = {key}
            try:
                device.use(key)
                launched += 1
            except OSError:
                assert not device.cache.is_resident(key)
            device.store.broken = set()
        device.cache.check_integrity()
    device.cache.close()
    device.streams.run_all()
    assert device.kernels_run == launched


def test_a_miss_waits_for_nothing_but_its_own_copy() -> None:
    device = Device(Random(0), slots=2)
    device.use((0, 0))
    device.use((0, 2))
    assert device.kernels_run == 0  # neither call waited for the device
    device.use((0, 4))  # evicts (0, 0), whose kernel has not run yet
    assert device.kernels_run == 0
    device.streams.run_all()
    assert device.kernels_run == 3


def test_a_prefetched_expert_is_useful_only_when_it_is_there() -> None:
    device = Device(Random(0), slots=2)
    assert device.cache.prefetch((0, 0), frozenset())  # waits until it is there
    device.use((0, 0))
    statistics = device.cache.statistics
    assert (statistics.hits, statistics.misses) == (1, 0)
    assert statistics.prefetch_useful_bytes == SIZES[0]
    device.use((0, 2))
    device.use((0, 2))  # the copy is still on its way: asked for twice, missed twice
    assert (statistics.hits, statistics.misses) == (1, 2)


def test_the_host_tier_starts_with_those_that_have_no_slot() -> None:
    device = Device(Random(0), slots=1, host_cells=2)
    device.cache.fill()
    device.cache.statistics = PagingStatistics()
    assert device.host is not None
    held = [key for key in device.store.keys() if device.host.has(key)]
    assert held == [(0, 2), (0, 3), (0, 4), (0, 5)]  # rows 0 and 1 have the slots of their size
    reads = device.store.reads
    device.use((0, 2))
    assert (device.cache.statistics.host_hits, device.store.reads) == (1, reads)
    device.use((1, 0))  # from the disk, through the cell of the oldest: (0, 4)
    assert device.store.reads == reads + 1
    assert device.host.has((1, 0)) and device.host.has((0, 2)) and not device.host.has((0, 4))
    device.streams.run_all()
    assert device.kernels_run == 2


def test_what_is_held_in_the_host_tier_stays() -> None:
    device = Device(Random(0), slots=1, host_cells=1)
    assert device.host is not None
    device.use((0, 0))
    kept = device.host.hold((0, 0))
    assert kept is not None
    device.use((0, 2))  # no cell is free: it goes through a staging buffer
    assert not device.host.has((0, 2)) and set(kept.tolist()) == {0}
    device.host.let_go((0, 0), None)
    device.use((0, 4))
    assert device.host.has((0, 4)) and not device.host.has((0, 0))


def test_a_cell_is_not_overwritten_while_it_is_copied_from() -> None:
    device = Device(Random(0), slots=2, host_cells=1)
    device.use((0, 0))
    device.use((0, 2))  # the one cell of its size still has (0, 0), whose copy has not run
    device.streams.run_all()
    assert device.kernels_run == 2


def test_pinned_memory_is_taken_once_and_billed() -> None:
    device = Device(Random(0), slots=1, host_cells=2)
    sizes = [[SIZES[row % 2] for row in range(6)]] * 2
    tier, staging = host_terms(sizes, "cuda", ram_bytes=STAGING_BUFFERS * 8 + 2 * (4 + 8))
    assert (tier.num_bytes, staging.num_bytes) == (2 * (4 + 8), STAGING_BUFFERS * 8)
    taken = device.streams.host_bytes
    assert taken == staging.num_bytes + 256 + 2 * 8  # the second size starts aligned
    device.cache.fill()
    for key in device.store.keys() * 2:
        device.use(key)
    assert device.streams.host_bytes == taken
    assert host_terms(sizes, "cpu", ram_bytes=None) == []


def test_too_little_ram_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(InputError, match=r"--ram 39 B .* give at least"):
        host_slots([[4, 8]], STAGING_BUFFERS * 8 + 7)


@pytest.mark.gpu
def test_copies_and_kernels_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    slot = torch.zeros(2**24, dtype=torch.uint8, device=device)
    streams: Streams = CudaStreams(device)
    source = streams.host_memory(slot.numel())
    sums, used, arrival = [], None, None
    for value in range(1, 20):
        if arrival is not None:
            streams.wait(arrival)  # the source may change
        source.fill_(value)
        arrival = streams.copy(source, slot, used)
        streams.compute_waits_for(arrival)
        sums.append(slot.sum(dtype=torch.int64))
        used = streams.mark_compute()
    assert [int(found) for found in sums] == [value * slot.numel() for value in range(1, 20)]
    torch.cuda.synchronize()
    assert streams.stalled_seconds() >= 0
    streams.close()
