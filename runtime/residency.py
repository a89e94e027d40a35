"""`Residency`: which experts of an open model are in memory, and what pages the others in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from edge_moe.runtime.allotment import Slots
from edge_moe.runtime.expert_cache import ExpertCache, HostTier
from edge_moe.runtime.expert_store import ExpertStore
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
        device = options.device
        host = None
        if options.ram_bytes and device.type == "cuda":  # on a CPU the slots already are the RAM
            host = HostTier(options.ram_bytes, is_pinned=True)
        buffers = SlotBuffers(slots.counts, device)
        cache = ExpertCache(store, buffers, DEFAULT_POLICY, host=host, device=device)
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
        return cls(store, slots, cache, pager, prefetcher, blocks)

    def close(self) -> None:
        """Stop reading ahead, and let the model forget the pager, so that its slots are freed."""
        if self.prefetcher is not None:
            self.prefetcher.close()
        detach(self.blocks)
        if self.pager.packed is not None:
            self.pager.packed.close()
