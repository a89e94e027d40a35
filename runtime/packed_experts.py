"""Chosen experts computed as they lie in their slots, many in one product of libggml.

Letters: T tokens, K top_k, H hidden_size, R pairs of a token and an expert.

Experts are asked for in the order in which the reference asks for them, and held until they are
computed together, unless one would have to leave for another: so both page alike. Results do not
depend on how many slots there are, since libggml computes each expert's rows by themselves and what
a token's experts give is added in router order.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.moe_block import add_down_bias, apply_gate
from edge_moe.runtime.policy import Key
from edge_moe.runtime.slot_products import SlotProducts

Tensor = torch.Tensor
IntArray = npt.NDArray[np.int64]

_PROBES = 64


class _Member(NamedTuple):
    """An expert that was chosen, and its pairs: places in the order of `_Pairs`."""

    row: int
    start: int
    stop: int


class Reference(Protocol):
    """Computes one expert in float32: `ExpertPager.unpacked_output`."""

    def __call__(self, experts: Any, form: str, packed: Tensor, inputs: Tensor, row: int) -> Tensor:
        """[n, H] -> [n, H]"""


class SlotHolder(Protocol):
    """Keeps packed experts in equal places of the CPU's memory, as `ExpertCache` does."""

    def acquire_beside(self, key: Key, held: Collection[Key]) -> int | None: ...

    def acquire_residents(self, keys: Sequence[Key]) -> list[int] | None: ...

    def release_residents(self, keys: Collection[Key]) -> None: ...

    def slot(self, key: Key, slot: int) -> Tensor: ...


@dataclass(frozen=True)
class _Pairs:
    """Who chose whom, sorted by router row, then by token."""

    rows: IntArray
    """[R]"""
    tokens: Tensor
    """int64 [R]"""
    weights: Tensor
    """float32 [R]"""

    @classmethod
    def of(cls, rows: Tensor, weights: Tensor) -> _Pairs:
        """From [T, K] of both; row -1 is nobody."""
        flat, top_k = rows.reshape(-1).numpy(), rows.shape[1]
        order = np.argsort(flat, kind="stable")[int((flat < 0).sum()) :]
        scales = weights.reshape(-1)[torch.from_numpy(order)].float()
        return cls(flat[order], torch.from_numpy(order // top_k), scales)

    def members(self) -> Iterator[_Member]:
        """Every expert with its places."""
        ids, starts = np.unique(self.rows, return_index=True)
        stops = [*starts.tolist(), len(self.rows)][1 : len(ids) + 1]
        for row, start, stop in zip(ids.tolist(), starts.tolist(), stops, strict=True):
            yield _Member(row, start, stop)


class SlotExperts:
    """Computes experts in forms that libggml was chosen for, and asks a reference for others."""

    def __init__(
        self,
        store: ExpertStore,
        cache: SlotHolder,
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

    def token(
        self, experts: Any, layer: int, hidden: Tensor, rows: list[int], weights: list[float]
    ) -> Tensor:
        """[1, H]: `forward` for one token [1, H], its K rows and their weights."""
        chosen = sorted((row, place) for place, row in enumerate(rows) if row >= 0)
        if not chosen:
            return torch.zeros_like(hidden)
        members = [_Member(row, number, number + 1) for number, (row, _) in enumerate(chosen)]
        results = []
        with closing(self._groups(layer, members)) as groups:
            for group in groups:
                result = self._outputs(experts, layer, hidden, group)
                is_whole = len(group.members) == len(members)
                results.append(result if is_whole else result.clone())
        scales = torch.tensor([[weights[place]] for _, place in chosen])
        together = results[0] if len(results) == 1 else torch.cat(results)
        return together.mul_(scales).sum(0, keepdim=True)

    def forward(
        self, experts: Any, layer: int, hidden: Tensor, rows: Tensor, weights: Tensor
    ) -> Tensor:
        """Weighted sum [T, H] of the chosen experts' outputs.

        Args:
            experts: transformers' experts module of this layer.
            hidden: float32 [T, H] input of the MoE block.
            rows, weights: [T, K] the choice; row -1 is nobody.
        """
        pairs, output = _Pairs.of(rows, weights), torch.zeros_like(hidden)
        with closing(self._groups(layer, pairs.members())) as groups:
            for group in groups:
                places = slice(group.members[0].start, group.members[-1].stop)
                tokens = pairs.tokens[places]
                results = self._outputs(experts, layer, hidden, group, tokens)
                output.index_add_(0, tokens, results.mul_(pairs.weights[places, None]))
        return output

    def close(self) -> None:
        """Free what C allocated."""
        self._products.close()

    def _groups(self, layer: int, members: Iterable[_Member]) -> Generator[_Group]:
        """Members that slots and workspace hold at once, held while the caller computes them."""
        most_rows = self._products.most_rows
        group, members = _Group(self._cache, layer), list(members)
        try:
            if members and members[-1].stop <= most_rows and group.hold_residents(members):
                yield group
                return
            for member in members:
                num_rows = group.num_rows + member.stop - member.start
                has_room = num_rows <= most_rows or not group.members
                if not (has_room and group.hold(member)):
                    yield group
                    group.release()
                    group.hold(member)
            if group.members:
                yield group
        finally:
            group.release()

    def _outputs(
        self,
        experts: Any,
        layer: int,
        hidden: Tensor,
        group: _Group,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """[R, H] un-gated, in the group's order; may be overwritten by the next call.

        `tokens` [R] says which row of `hidden` each pair takes; without it there is but one.
        """
        by_form: dict[str, list[_Member]] = {}
        for member in group.members:
            by_form.setdefault(self._forms[layer][member.row], []).append(member)
        if len(by_form) == 1:
            ((form, members),) = by_form.items()
            inputs = hidden if tokens is None else hidden[tokens]
            return self._of_form(experts, form, inputs, members, group)
        together = torch.empty(group.num_rows, hidden.shape[1])
        first = group.members[0].start
        for form, members in by_form.items():
            places = torch.cat([torch.arange(m.start - first, m.stop - first) for m in members])
            inputs = hidden if tokens is None else hidden[tokens[places]]
            together[places] = self._of_form(experts, form, inputs, members, group)
        return together

    def _of_form(
        self, experts: Any, form: str, inputs: Tensor, members: list[_Member], group: _Group
    ) -> Tensor:
        """[R, H] of experts in one form; `inputs` are [R, H], or one row for all."""
        lengths = [member.stop - member.start for member in members]
        if form not in self._ggml_forms:
            pieces = torch.split(inputs.expand(sum(lengths), -1), lengths)
            return torch.cat(
                [
                    self._reference(experts, form, group.packed(member), piece, member.row)
                    for member, piece in zip(members, pieces, strict=True)
                ]
            )
        slots = np.array([group.slots[member.row] for member in members])
        if sum(lengths) > len(slots):
            slots = slots.repeat(lengths)
        if self._is_plain(experts):
            return self._products.gated(form, inputs, slots)
        rows = torch.from_numpy(np.repeat([member.row for member in members], lengths))
        inner = apply_gate(experts, self._products.gate_up(form, inputs, slots), rows)
        return add_down_bias(experts, self._products.down(form, inner, slots), rows)

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

    def __init__(self, cache: SlotHolder, layer: int) -> None:
        self.members: list[_Member] = []
        self.slots: dict[int, int] = {}
        """By router row."""
        self._cache = cache
        self._layer = layer
        self._held: dict[Key, None] = {}

    @property
    def num_rows(self) -> int:
        """Pairs of all members."""
        return self.members[-1].stop - self.members[0].start if self.members else 0

    def hold(self, member: _Member) -> bool:
        """Keep an expert in its slot; False where a member would be evicted for it."""
        key = self._layer, member.row
        slot = self._cache.acquire_beside(key, self._held)
        if slot is None:
            return False
        self._held[key] = None
        self.slots[member.row] = slot
        self.members.append(member)
        return True

    def hold_residents(self, members: Sequence[_Member]) -> bool:
        """Keep them all if all have slots; else hold none, and False."""
        keys = [(self._layer, member.row) for member in members]
        slots = self._cache.acquire_residents(keys)
        if slots is None:
            return False
        self._held = dict.fromkeys(keys)
        self.slots = {key[1]: slot for key, slot in zip(keys, slots, strict=True)}
        self.members.extend(members)
        return True

    def packed(self, member: _Member) -> Tensor:
        """uint8 [record_bytes]"""
        return self._cache.slot((self._layer, member.row), self.slots[member.row])

    def release(self) -> None:
        """Let go of all."""
        self._cache.release_residents(self._held)
        self._held.clear()
        self.slots.clear()
        self.members.clear()
