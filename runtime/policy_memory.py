"""What an order of eviction takes in memory while experts are paged, as a term of the bill."""

from __future__ import annotations

from collections.abc import Sequence

from edge_moe.plan import MemoryTerm
from edge_moe.runtime.policies import DEFAULT_POLICY
from edge_moe.runtime.policy import EvictionPolicy

TERM_NAME = "eviction order"


def order_terms(
    num_rows: Sequence[int],
    num_orders: int = 1,
    policy: type[EvictionPolicy] = DEFAULT_POLICY,
) -> list[MemoryTerm]:
    """What `num_orders` policies over layers of `num_rows` [L] experts take in RAM."""
    num_bytes = num_orders * policy.order_bytes(len(num_rows), max(num_rows))
    if not num_bytes:
        return []
    note = "what each expert was followed by"
    return [MemoryTerm(name=TERM_NAME, num_bytes=num_bytes, source="formula", note=note)]
