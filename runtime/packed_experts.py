"""Chosen experts computed as they lie in their slots, many in one product of libggml.

Letters: T tokens, K top_k, H hidden_size, R pairs of a token and an expert.

Experts are asked for in the order in which the reference asks for them, and held until they are
computed together, unless one would have to leave for another: so both page alike. Results do not
depend on how many slots there are, since libggml computes each expert's rows by themselves and what
a token's experts give is added in router order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.moe_block import add_down_bias, apply_gate
from edge_moe.runtime.policy import Key
from edge_moe.runtime.slot_products import SlotProducts

Tensor = torch.Tensor

_PROBES = 64


class Reference(Protocol):
    """Computes one expert in float32: `ExpertPager.unpacked_output`."""

    def __call__(self, experts: Any, form: str, packed: Tensor, inputs: Tensor, row: int) -> Tensor:
        """[n, H] -> [n, H]"""


@dataclass(frozen=True)
class _Member:
    """An expert that was chosen, and its pairs: places in the order of `_Pairs`."""

    row: int
    form: str
    start: int
    stop: int


@dataclass(frozen=True)
class _Pairs:
    """Who chose whom, sorted by router row, then by token."""

    rows: Tensor
    """int64 [R]"""
    tokens: Tensor
    """int64 [R]"""
    weights: Tensor
    """float32 [R]"""

    @classmethod
    def of(cls, rows: Tensor, weights: Tensor) -> _Pairs:
        """From [T, K] of both; row -1 is nobody."""
        flat, top_k = rows.reshape(-1), rows.shape[1]
        ordered, order = flat.sort(stable=True)
        num_nobody = int((flat < 0).sum())
        ordered, order = ordered[num_nobody:], order[num_nobody:]
        return cls(ordered, order // top_k, weights.reshape(-1)[order].float())

    def at(self, places: slice | Tensor) -> _Pairs:
        """Some of them."""
        return _Pairs(self.rows[places], self.tokens[places], self.weights[places])

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """(row, start, stop) of every expert's places."""
        ids, counts = torch.unique_consecutive(self.rows, return_counts=True)
        start = 0
        for row, count in zip(ids.tolist(), counts.tolist(), strict=True):
            yield row, start, start + count
            start += count


class PackedExperts:
    """Computes experts in forms that libggml was chosen for, and asks a reference for others."""

    def __init__(
        self,
        store: ExpertStore,
        cache: ExpertCache,
        products: SlotProducts,
        forms: frozenset[str],
        reference: Reference,
    ) -> None:
        self._cache = cache
        self._products = products
        self._ggml_forms = forms
        self._reference = reference
        self._plain: dict[int, bool] = {}
        self._forms = [
            [store.record((layer, row)).form for row in range(len(kept))]
            for layer, kept in enumerate(store.kept)
        ]

    def add(
        self,
        output: Tensor,
        experts: Any,
        layer: int,
        hidden: Tensor,
        rows: Tensor,
        weights: Tensor,
    ) -> None:
        """Add the weighted outputs of the chosen experts to `output` [T, H].

        Args:
            experts: transformers' experts module of this layer.
            hidden: float32 [T, H] input of the MoE block.
            rows, weights: [T, K] the choice; row -1 is nobody.
        """
        pairs = _Pairs.of(rows, weights)
        group = _Group(self._cache, layer)
        for row, start, stop in pairs.ranges():
            member = _Member(row, self._forms[layer][row], start, stop)
            if group.num_rows + stop - start > self._products.most_rows or group.is_in_way(row):
                self._add_group(output, experts, hidden, pairs, group)
                group = _Group(self._cache, layer)
            group.acquire(member)
        self._add_group(output, experts, hidden, pairs, group)

    def close(self) -> None:
        """Free what C allocated."""
        self._products.close()

    def _add_group(
        self, output: Tensor, experts: Any, hidden: Tensor, pairs: _Pairs, group: _Group
    ) -> None:
        """Compute what a group holds, and let go of it."""
        with group:
            if not group.members:
                return
            start = group.members[0].start
            mine = pairs.at(slice(start, group.members[-1].stop))
            results = [
                (places, self._of_form(experts, form, hidden, mine.at(places), group))
                for form, places in group.places_by_form(start)
            ]
        together = results[0][1]
        if len(results) > 1:
            together = together.new_empty(len(mine.rows), together.shape[1])
            for places, result in results:
                together[places] = result
        output.index_add_(0, mine.tokens, together.mul_(mine.weights[:, None]))

    def _of_form(
        self, experts: Any, form: str, hidden: Tensor, pairs: _Pairs, group: _Group
    ) -> Tensor:
        """[R, H] un-gated outputs of experts in one form."""
        if form not in self._ggml_forms:
            return torch.cat(
                [
                    self._reference(
                        *(experts, form, group.packed(row)),
                        *(hidden[pairs.tokens[start:stop]], row),
                    )
                    for row, start, stop in pairs.ranges()
                ]
            )
        slots = group.slots(pairs.rows)
        inputs = hidden if len(hidden) == 1 else hidden[pairs.tokens]
        if self._is_plain(experts):
            return self._products.gated(form, inputs, slots)
        inner = apply_gate(experts, self._products.gate_up(form, inputs, slots), pairs.rows)
        return add_down_bias(experts, self._products.down(form, inner, slots), pairs.rows)

    def _is_plain(self, experts: Any) -> bool:
        """Whether an expert is down(silu(gate x) * up x), which libggml computes in one go.

        Asked of the module itself, at sizes where a family's limits would show.
        """
        known = self._plain.get(id(experts))
        if known is None:
            known = self._plain[id(experts)] = _multiplies_silu(experts)
        return known


def _multiplies_silu(experts: Any) -> bool:
    if experts.has_bias or not experts.has_gate or not experts.is_concatenated:
        return False
    gate, up = torch.linspace(-50.0, 50.0, 2 * _PROBES).view(2, _PROBES)
    probe = torch.stack([torch.cat([gate, up]), torch.cat([up, gate])])
    expected = F.silu(probe[:, :_PROBES]) * probe[:, _PROBES:]
    return torch.allclose(apply_gate(experts, probe, 0), expected, rtol=1e-5, atol=1e-5)


class _Group:
    """Experts of one layer that are held at the same time."""

    def __init__(self, cache: ExpertCache, layer: int) -> None:
        self.members: list[_Member] = []
        self._cache = cache
        self._layer = layer
        self._pins = ExitStack()
        self._slots: dict[int, int] = {}

    @property
    def num_rows(self) -> int:
        """Pairs of all members."""
        return self.members[-1].stop - self.members[0].start if self.members else 0

    def is_in_way(self, row: int) -> bool:
        """Whether a member would be evicted for the expert in `row`."""
        held = {self._key(member.row) for member in self.members}
        return bool(held) and self._cache.would_evict(self._key(row), held)

    def acquire(self, member: _Member) -> None:
        """Hold an expert until the group is left; after an error, let go of all."""
        key = self._key(member.row)
        try:
            self._slots[member.row] = self._cache.acquire_slot(key)
        except BaseException:
            self._pins.close()
            raise
        self._pins.callback(self._cache.release, key)
        self.members.append(member)

    def places_by_form(self, start: int) -> list[tuple[str, slice | Tensor]]:
        """Where the members of each form have their pairs, counted from `start`."""
        forms = list(dict.fromkeys(member.form for member in self.members))
        if len(forms) == 1:
            return [(forms[0], slice(None))]
        ranges = {
            form: [
                torch.arange(member.start - start, member.stop - start)
                for member in self.members
                if member.form == form
            ]
            for form in forms
        }
        return [(form, torch.cat(found)) for form, found in ranges.items()]

    def slots(self, rows: Tensor) -> Tensor:
        """int64 [R] slots of the experts in `rows`."""
        return torch.tensor([self._slots[row] for row in rows.tolist()])

    def packed(self, row: int) -> Tensor:
        """uint8 [record_bytes] of a member."""
        return self._cache.slot(self._key(row), self._slots[row])

    def _key(self, row: int) -> Key:
        return self._layer, row

    def __enter__(self) -> _Group:
        return self

    def __exit__(self, *_: object) -> None:
        self._pins.close()
