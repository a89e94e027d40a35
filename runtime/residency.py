"""`Residency`: which experts of an open model are in memory, and what pages the others in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edge_moe.runtime.allotment import Slots, host_slots, record_sizes
from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.host_tier import HostTier
from edge_moe.runtime.kernel_choice import KernelChoice
from edge_moe.runtime.model import compute_dtype
from edge_moe.runtime.packed_experts import SlotExperts
from edge_moe.runtime.paged_experts import ExpertPager, attach, detach
from edge_moe.runtime.policies import DEFAULT_POLICY
from edge_moe.runtime.policy import PagingStatistics
from edge_moe.runtime.prefetch import Prefetcher
from edge_moe.runtime.skipping import SkipRule
from edge_moe.runtime.slot_products import SlotProducts
from edge_moe.runtime.slots import SlotBuffers
from edge_moe.runtime.streams import CudaStreams, Streams
from edge_moe.runtime.transfer import DirectTransfer, StagedTransfer, Transfer
from edge_moe.spec import ModelSpec


@dataclass(frozen=True)
class PagingOptions:
    """How experts are paged, whichever of them are in use."""

    device: torch.device
    prefetch: bool
    ram_bytes: int | None
    """On CUDA, packed experts kept in RAM between the disk and the GPU."""
    skip: SkipRule | None
    kernels: KernelChoice


@dataclass(frozen=True)
class Residency:
    """Slots, what is in them, and the pager that the model calls."""

    store: ExpertStore
    slots: Slots
    cache: ExpertCache
    transfer: Transfer
    host: HostTier | None
    pager: ExpertPager
    prefetcher: Prefetcher | None
    blocks: list[Any]

    @classmethod
    def open(
        cls,
        spec: ModelSpec,
        blocks: list[Any],
        store: ExpertStore,
        slots: Slots,
        options: PagingOptions,
    ) -> Residency:
        """Fill the slots as far as they go and attach the pager; counting starts afterwards."""
        device, sizes = options.device, record_sizes(store)
        buffers = SlotBuffers(slots.counts, device)
        streams = CudaStreams(device) if device.type == "cuda" else None
        transfer = _transfer(streams, sizes)
        host = None
        if options.ram_bytes and streams is not None:  # on a CPU the slots already are the RAM
            host = _host_tier(host_slots(sizes, options.ram_bytes), streams, transfer)
        cache = ExpertCache(store, buffers, DEFAULT_POLICY, host=host, transfer=transfer)
        cache.fill()
        cache.statistics = PagingStatistics()
        prefetcher = None
        # latent experts are not given what the next router would be
        if options.prefetch and slots.is_paging and not spec.latent_width:
            prefetcher = Prefetcher(blocks, store, cache, options.skip)
        pager = ExpertPager(
            spec, store, cache, compute_dtype(spec, device), prefetcher, options.skip
        )
        if forms := options.kernels.ggml_forms:
            products = SlotProducts(spec, buffers)
            pager.packed = SlotExperts(store, cache, products, forms, pager.unpacked_output)
        attach(blocks, pager)
        return cls(store, slots, cache, transfer, host, pager, prefetcher, blocks)

    def close(self) -> None:
        """Stop reading ahead, and let the model forget the pager, so that its slots are freed."""
        if self.prefetcher is not None:
            self.prefetcher.close()
        detach(self.blocks)
        if self.pager.packed is not None:
            self.pager.packed.close()
        self.transfer.close()


def _transfer(streams: Streams | None, sizes: Sequence[Sequence[int]]) -> Transfer:
    if streams is None:
        return DirectTransfer()
    return StagedTransfer(streams, max(map(max, sizes)))


def _host_tier(counts: Mapping[int, int], streams: Streams, transfer: Transfer) -> HostTier:
    buffers = SlotBuffers(counts, torch.device("cpu"), streams.host_memory)
    return HostTier(buffers, transfer.wait)
