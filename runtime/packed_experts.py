"""Chosen experts computed as they lie in their slots, many in one product of libggml.

Letters: T tokens, K top_k, H hidden_size, R pairs of a token and an expert.

Results do not depend on how many slots there are: libggml computes each expert's rows by
themselves, an expert with many tokens is cut at a fixed number of them, and what a token's experts
give is added form by form, in router order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.expert_store import ExpertStore, RecordInfo
from edge_moe.runtime.moe_block import add_down_bias, apply_gate
from edge_moe.runtime.slot_products import SlotProducts

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Piece:
    """Pairs of one expert: places in the order of `_Pairs`."""

    row: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class _Pairs:
    """Who chose whom, sorted by expert, then by token."""

    rows: Tensor
    """int64 [R] router rows."""
    tokens: Tensor
    """int64 [R]"""
    weights: Tensor
    """float32 [R]"""

    @classmethod
    def of(cls, rows: Tensor, weights: Tensor) -> _Pairs:
        """From [T, K] of both; row -1 is nobody."""
        flat, top_k = rows.reshape(-1), rows.shape[1]
        ordered, order = flat.sort(stable=True)
        order = order[int((flat < 0).sum()) :]
        chosen = weights.reshape(-1)[order].float()
        return cls(ordered[len(flat) - len(order) :], order // top_k, chosen)

    def pieces(self, most_rows: int) -> list[_Piece]:
        """Each expert's pairs, at most `most_rows` at a time."""
        ids, counts = torch.unique_consecutive(self.rows, return_counts=True)
        found, start = [], 0
        for row, count in zip(ids.tolist(), counts.tolist(), strict=True):
            stop = start + count
            for first in range(start, stop, most_rows):
                found.append(_Piece(row, first, min(stop, first + most_rows)))
            start = stop
        return found


class PackedExperts:
    """What `ExpertPager` asks first: computes the experts of the forms that it was given."""

    def __init__(
        self,
        store: ExpertStore,
        cache: ExpertCache,
        products: SlotProducts,
        forms: frozenset[str],
    ) -> None:
        self._cache = cache
        self._products = products
        self._records = [
            [store.record((layer, row)) for row in range(len(kept))]
            for layer, kept in enumerate(store.kept)
        ]
        self._left_rows = [
            torch.tensor([record.form not in forms for record in layer]) for layer in self._records
        ]
        self._has_left = [bool(layer.any()) for layer in self._left_rows]

    def add(
        self,
        output: Tensor,
        experts: Any,
        layer: int,
        hidden: Tensor,
        rows: Tensor,
        weights: Tensor,
    ) -> Tensor | None:
        """Add the weighted outputs of the chosen experts to `output` [T, H].

        Args:
            hidden: float32 [T, H] input of the MoE block.
            rows, weights: [T, K] the choice; row -1 is nobody.

        Returns: [T, K] rows of the experts whose forms are left to the caller, or -1; None if none.
        """
        left = self._left(layer, rows)
        mine = rows if left is None else torch.where(left < 0, rows, -1)
        pairs = _Pairs.of(mine, weights)
        for group in self._groups(layer, pairs.pieces(self._products.most_rows)):
            self._add_group(output, experts, layer, hidden, pairs, group)
        return left

    def close(self) -> None:
        """Free what C allocated."""
        self._products.close()

    def _left(self, layer: int, rows: Tensor) -> Tensor | None:
        if not self._has_left[layer]:
            return None
        is_left = (rows >= 0) & self._left_rows[layer][rows.clamp(min=0)]
        return torch.where(is_left, rows, -1) if is_left.any() else None

    def _groups(self, layer: int, pieces: list[_Piece]) -> Iterator[list[_Piece]]:
        """Pieces of one form each that slots and workspace hold at once."""
        by_record: dict[RecordInfo, list[_Piece]] = {}
        for piece in pieces:
            by_record.setdefault(self._records[layer][piece.row], []).append(piece)
        for record in sorted(by_record, key=lambda record: record.form):
            most_experts = self._cache.num_slots(record.num_bytes)
            group: list[_Piece] = []
            for piece in by_record[record]:
                num_rows = sum(map(len, group)) + len(piece)
                num_experts = len({item.row for item in group} | {piece.row})
                if num_rows > self._products.most_rows or num_experts > most_experts:
                    yield group
                    group = []
                group.append(piece)
            yield group

    def _add_group(
        self,
        output: Tensor,
        experts: Any,
        layer: int,
        hidden: Tensor,
        pairs: _Pairs,
        group: list[_Piece],
    ) -> None:
        form = self._records[layer][group[0].row].form
        places = torch.cat([torch.arange(piece.start, piece.stop) for piece in group])
        tokens, rows = pairs.tokens[places], pairs.rows[places]
        with ExitStack() as pins:
            slots = self._acquire(pins, layer, group)
            inputs = hidden if len(hidden) == 1 else hidden[tokens]
            inner = apply_gate(experts, self._products.gate_up(form, inputs, slots), rows)
            results = self._products.down(form, inner, slots)
        results = add_down_bias(experts, results, rows)
        output.index_add_(0, tokens, results.mul_(pairs.weights[places, None]))

    def _acquire(self, pins: ExitStack, layer: int, group: list[_Piece]) -> Tensor:
        """int64 [R] slots of a group's experts, pinned until `pins` is closed.

        Residents are pinned first, lest they are evicted for the others.
        """
        keys = {(layer, piece.row) for piece in group}
        slots = {}
        for key in sorted(keys, key=lambda key: (not self._cache.is_resident(key), key)):
            slots[key[1]] = self._cache.acquire_slot(key)
            pins.callback(self._cache.release, key)
        lengths = torch.tensor([len(piece) for piece in group])
        return torch.tensor([slots[piece.row] for piece in group]).repeat_interleave(lengths)
