"""What an order of eviction takes in memory while experts are paged, as a term of the bill."""

from __future__ import annotations

from collections.abc import Sequence

from edge_moe.plan import MemoryTerm
from edge_moe.runtime.next_use import ROWS_AT_ONCE, SoonestNextUse
from edge_moe.runtime.policies import DEFAULT_POLICY
from edge_moe.runtime.policy import EvictionPolicy

TERM_NAME = "eviction order"
_BYTES_PER_PAIR = 4
_BYTES_PER_ROW = 8 + 8 + 8 + 1
"""Two float64 of expectation, one share, and whether it is resident."""
_BYTES_PER_PAIR_OF_LAYERS = 8
_BYTES_PER_LAYER = 8 + 8


def order_bytes(num_layers: int, num_rows: int) -> int:
    """Arrays of one `SoonestNextUse` over so many layers of `num_rows` experts, at most."""
    rows = -(-num_rows // ROWS_AT_ONCE) * ROWS_AT_ONCE
    per_layer = rows * (_BYTES_PER_PAIR * rows + _BYTES_PER_ROW) + _BYTES_PER_LAYER
    return num_layers * (per_layer + _BYTES_PER_PAIR_OF_LAYERS * num_layers)


def order_terms(
    num_rows: Sequence[int],
    num_orders: int = 1,
    policy: type[EvictionPolicy] = DEFAULT_POLICY,
) -> list[MemoryTerm]:
    """What `num_orders` policies over layers of `num_rows` [L] experts take in RAM.

    Nothing for policies that keep a few numbers per resident.
    """
    if not issubclass(policy, SoonestNextUse):
        return []
    num_bytes = num_orders * order_bytes(len(num_rows), max(num_rows))
    note = "what each expert was followed by"
    return [MemoryTerm(name=TERM_NAME, num_bytes=num_bytes, source="formula", note=note)]
