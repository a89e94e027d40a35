"""`Residency`: which experts of an open model are in memory, and what pages the others in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from edge_moe.budget import demand_readers
from edge_moe.errors import InputError
from edge_moe.plan import Device
from edge_moe.runtime.ahead_reader import AheadReader
from edge_moe.runtime.allotment import Slots, host_slots, record_sizes
from edge_moe.runtime.certain_prefetch import CertainPrefetcher
from edge_moe.runtime.cpu_misses import CpuMisses, HostExperts
from edge_moe.runtime.dense_graphs import CudaCapture, DenseGraphs
from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.fetch_choice import MissChooser, Misses, check_misses
from edge_moe.runtime.host_tier import HostTier
from edge_moe.runtime.interleaved_trial import InterleavedTrial
from edge_moe.runtime.kernel_choice import KernelChoice, KernelChoices, Kernels
from edge_moe.runtime.linear_map import LinearMap
from edge_moe.runtime.miss_prices import PriceProbe
from edge_moe.runtime.model import compute_dtype
from edge_moe.runtime.packed_experts import SlotExperts
from edge_moe.runtime.paged_experts import ExpertPager, attach, detach
from edge_moe.runtime.policies import DEFAULT_POLICY
from edge_moe.runtime.policy import LeastRecentlyUsed, PagingStatistics
from edge_moe.runtime.pre_gate import PreGate
from edge_moe.runtime.pre_gated_routing import PreGatedRouting
from edge_moe.runtime.predictor_choice import DEFAULT_PREDICTORS
from edge_moe.runtime.prefetch import open_prefetcher
from edge_moe.runtime.shadow_store import BodyStore
from edge_moe.runtime.shadow_tier import ShadowTier
from edge_moe.runtime.skipping import SkipRule
from edge_moe.runtime.slots import SlotBuffers
from edge_moe.runtime.stalls import EXACT, StallOptions
from edge_moe.runtime.streams import CudaStreams, Streams
from edge_moe.runtime.transfer import DirectTransfer, StagedTransfer, Transfer
from edge_moe.spec import ModelSpec


@dataclass(frozen=True)
class PagingOptions:
    """How experts are paged, whichever of them are in use."""

    device: torch.device
    prefetch: bool | None
    """None tries whether it pays."""
    ram_bytes: int | None
    """On CUDA, packed experts kept in RAM between the disk and the GPU."""
    skip: SkipRule | None
    misses: Misses = "fetch"
    kernels: Kernels = "auto"
    graphs: bool | None = None
    """Whether to replay captured graphs on CUDA; None tries."""
    stall: StallOptions = EXACT
    predictors: tuple[str, ...] = DEFAULT_PREDICTORS
    linear: LinearMap | None = None
    pre_gate: PreGate | None = None
    """Chooses in the place of the routers."""
    rearranged: bool = False
    """Whether experts are rearranged for llama.cpp's faster kernels while they are read."""

    def __post_init__(self) -> None:
        """Raises InputError for what cannot be done."""
        check_misses(self.misses, self.ram_bytes)
        if self.graphs and self.kind != "cuda":
            raise InputError(f"graphs are captured on CUDA, not on {self.kind}: leave --graphs out")
        if self.rearranged and self.kind != "cpu":
            raise InputError(
                "--rearranged is for llama.cpp's kernels, which compute experts on a CPU: add "
                "--device cpu, or leave it out"
            )
        if self.rearranged and self.kernels in ("exact", "triton"):
            raise InputError(
                f"--rearranged is for llama.cpp's kernels: leave out --kernels {self.kernels}, or "
                "this"
            )

    @property
    def tier_bytes(self) -> int | None:
        """RAM for experts beside the slots; on a CPU the slots already are the RAM."""
        return self.ram_bytes if self.device.type == "cuda" or self.misses == "cpu" else None

    @property
    def kind(self) -> Device:
        """The device, as a bill names it."""
        return "cuda" if self.device.type == "cuda" else "cpu"


@dataclass(frozen=True)
class Residency:
    """Slots, what is in them, and the pager that the model calls."""

    store: ExpertStore
    slots: Slots
    cache: ExpertCache
    transfer: Transfer
    host: HostTier | None
    pager: ExpertPager
    prefetcher: AheadReader | None
    blocks: list[Any]
    shadows: ShadowTier | None
    closing: ExitStack
    """Closes what was opened, the last first."""

    @classmethod
    def open(
        cls,
        spec: ModelSpec,
        blocks: list[Any],
        store: ExpertStore,
        slots: Slots,
        options: PagingOptions,
        kernels: KernelChoices,
        shadows: ExpertStore | None = None,
    ) -> Residency:
        """Fill the slots as far as they go and attach the pager; counting starts afterwards.

        With `shadows` those stay in memory beside the slots, and `store` is a `BodyStore`.

        Raises:
            PackageError, CheckpointError, OSError: an expert is damaged or cannot be read.
            InputError: RAM for less than one expert.
        """
        device, sizes = options.device, record_sizes(store)
        with ExitStack() as held:  # closed where opening fails
            buffers = SlotBuffers(slots.counts, device)
            streams = CudaStreams(device) if device.type == "cuda" else None
            transfer = _transfer(streams, sizes)
            held.callback(transfer.close)
            host = None
            if options.tier_bytes:
                counts = host_slots(sizes, options.tier_bytes, options.kind)
                host = _host_tier(counts, streams, transfer)
            # where nothing ever leaves, the order that takes next to no memory and time
            policy = DEFAULT_POLICY if slots.is_paging else LeastRecentlyUsed
            num_readers = 0 if store.unpacks else demand_readers(spec)
            cache = ExpertCache(
                *(store, buffers, policy), host=host, transfer=transfer, num_readers=num_readers
            )
            held.callback(cache.close)
            cache.fill()
            filling, cache.statistics = cache.statistics, PagingStatistics()
            routing = None
            if options.pre_gate is not None:
                gate = options.pre_gate.for_experts(store.kept).to(device)
                routing = PreGatedRouting(gate, blocks, spec)
                held.callback(routing.close)
            prefetcher = None
            if options.prefetch is not False and slots.is_paging and shadows is None:
                prefetcher = _prefetcher(spec, blocks, store, cache, options, routing)
            if prefetcher is not None:
                held.callback(prefetcher.close)
            pager = ExpertPager(spec, store, cache, prefetcher, options.skip, routing)
            held.callback(pager.close)
            products = kernels.experts.new_products(spec, buffers, store.tail)
            if products is not None:
                pager.packed = SlotExperts(store, cache, products, pager.unpacked_output)
            if host is not None and slots.is_paging and options.misses != "fetch":
                pager.misses = _cpu_misses(
                    *(spec, blocks, pager, host, transfer, options, kernels.misses)
                )
            tier = None
            if shadows is not None and isinstance(store, BodyStore):
                rate = options.stall.bytes_per_second or filling.page_in_rate
                tier = ShadowTier.open(
                    *(spec, store, shadows, (cache, transfer, pager)),
                    *(options, kernels.shadows, rate),
                )
                held.callback(tier.close)
            attach(blocks, pager)
            held.callback(detach, blocks)
            closing = held.pop_all()
        return cls(
            *(store, slots, cache, transfer, host, pager, prefetcher, blocks, tier),
            closing=closing,
        )

    @property
    def miss_trial(self) -> InterleavedTrial | None:
        """Whether computing misses on the CPU pays, where that is being tried."""
        return self.pager.misses.chooser.trial if self.pager.misses is not None else None

    def close(self) -> None:
        """Stop reading ahead, and let the model forget the pager, so that its slots are freed."""
        self.closing.close()


def dense_graphs(
    model: Any, pager: ExpertPager, blocks: Sequence[Any], options: PagingOptions, context: int
) -> DenseGraphs | None:
    """What replays the dense segments of a token; None on a CPU, where there is nothing to gain."""
    if options.device.type != "cuda":
        return None
    reason = ""
    if options.graphs is False:
        reason = "--no-graphs"
    elif options.pre_gate is not None:
        reason = "a pre-gate chooses the experts between them"
    elif pager.shadowed is not None:
        reason = "experts may be computed from shadows, so that two runs of a token may differ"
    return DenseGraphs(
        model,
        pager,
        [block.experts for block in blocks],
        CudaCapture(options.device) if not reason else None,
        context,
        trial=InterleavedTrial() if options.graphs is None else None,
        reason=reason,
    )


def _transfer(streams: Streams | None, sizes: Sequence[Sequence[int]]) -> Transfer:
    if streams is None:
        return DirectTransfer()
    return StagedTransfer(streams, max(map(max, sizes)))


def _host_tier(counts: Mapping[int, int], streams: Streams | None, transfer: Transfer) -> HostTier:
    allocate = streams.host_memory if streams is not None else None
    buffers = SlotBuffers(counts, torch.device("cpu"), allocate)
    return HostTier(buffers, transfer.wait)


def _prefetcher(
    spec: ModelSpec,
    blocks: Sequence[Any],
    store: ExpertStore,
    cache: ExpertCache,
    options: PagingOptions,
    routing: PreGatedRouting | None,
) -> AheadReader | None:
    if routing is not None:
        return CertainPrefetcher(routing, store, cache)
    names, has_trial = options.predictors, options.prefetch is None
    return open_prefetcher(
        *(spec, blocks, store, cache, names, options.skip, options.linear), has_trial=has_trial
    )


def _cpu_misses(
    spec: ModelSpec,
    blocks: Sequence[Any],
    pager: ExpertPager,
    host: HostTier,
    transfer: Transfer,
    options: PagingOptions,
    kernels: KernelChoice | None,
) -> CpuMisses | None:
    """Measures what `auto` has to know; None where nothing is in RAM."""
    keys = host.keys()
    if not keys:
        return None
    experts = HostExperts(spec, pager.store, host, kernels, pager.unpacked_output)
    prefetcher = pager.prefetcher
    misses = CpuMisses(
        pager.store,
        pager.cache,
        host,
        experts,
        MissChooser(None),
        lambda: prefetcher.queued_bytes if prefetcher is not None else 0,
    )
    if options.misses == "auto":
        dtype = compute_dtype(spec, options.device)
        hidden = torch.randn(1, spec.expert_hidden, dtype=dtype, device=options.device)
        modules = [block.experts for block in blocks]
        probe = PriceProbe(misses, host, transfer, modules, hidden, spec.top_k)
        misses.chooser = MissChooser(probe.prices(), InterleavedTrial())
    return misses
