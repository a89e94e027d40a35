"""Every shadow of an open model in memory, and what computes experts from them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_moe.runtime.allotment import record_sizes
from edge_moe.runtime.body_reader import BodyReader
from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.kernel_choice import KernelChoice
from edge_moe.runtime.packed_experts import SlotExperts
from edge_moe.runtime.paged_experts import ExpertPager
from edge_moe.runtime.policy import LeastRecentlyUsed
from edge_moe.runtime.shadow_experts import ShadowExperts
from edge_moe.runtime.shadow_store import BodyStore
from edge_moe.runtime.slots import SlotBuffers
from edge_moe.runtime.transfer import Transfer
from edge_moe.spec import ModelSpec

if TYPE_CHECKING:
    from edge_moe.runtime.residency import PagingOptions

Bodies = tuple[ExpertCache, Transfer, ExpertPager]
"""What holds them, fills their slots, and computes them."""


@dataclass(frozen=True)
class ShadowTier:
    """A cache with a slot for every shadow, from which nothing is evicted."""

    cache: ExpertCache
    pager: ExpertPager
    reader: BodyReader

    @classmethod
    def open(
        cls,
        spec: ModelSpec,
        store: BodyStore,
        shadows: ExpertStore,
        bodies: Bodies,
        options: PagingOptions,
        kernels: KernelChoice | None,
        bytes_per_second: float,
    ) -> ShadowTier:
        """Read all of `shadows`, and have the bodies' pager use them.

        `kernels` compute the shadows; `bytes_per_second` is how fast bodies of `store` are read.

        Raises:
            PackageError, OSError: a shadow is damaged or cannot be read.
        """
        body_cache, transfer, body_pager = bodies
        counts = Counter(size for layer in record_sizes(shadows) for size in layer)
        buffers = SlotBuffers(counts, options.device)
        cache = ExpertCache(shadows, buffers, LeastRecentlyUsed, transfer=transfer)
        cache.fill()
        pager = ExpertPager(spec, shadows, cache, None)
        products = kernels.new_products(spec, buffers) if kernels is not None else None
        if products is not None:
            pager.packed = SlotExperts(shadows, cache, products, pager.unpacked_output)
        reader = BodyReader(body_cache, bytes_per_second, is_repeatable=options.stall.is_repeatable)
        body_pager.shadowed = ShadowExperts(body_pager, pager, store, reader, options.stall)
        return cls(cache, pager, reader)

    def close(self) -> None:
        """Stop reading bodies, and free what C allocated."""
        self.reader.close()
        self.pager.close()
