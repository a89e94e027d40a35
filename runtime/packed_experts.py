"""Chosen experts computed as they lie in their slots, many in one product (`Products`).

Letters: T tokens, K top_k, H hidden_size, R pairs of a token and an expert.

Experts that are here are computed while others are read. Results do not depend on how many slots
there are, since each expert's rows are computed by themselves and what a token's experts give is
added in router order.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from edge_moe.runtime.delta_products import DOWN, FIRST, delta_outputs
from edge_moe.runtime.delta_tail import DeltaTail, tail_of
from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.held_experts import HeldExperts, SlotHolder, held_groups
from edge_moe.runtime.moe_block import add_down_bias, apply_gate
from edge_moe.runtime.products import Chosen, Member, Pairs, Products

Tensor = torch.Tensor

_PROBES = 64


class Reference(Protocol):
    """Computes one expert in float32: `ExpertPager.unpacked_output`."""

    def __call__(self, experts: Any, form: str, packed: Tensor, inputs: Tensor, row: int) -> Tensor:
        """[n, H] -> [n, H]"""


class SlotExperts:
    """Computes experts in forms that `products` takes, and asks a reference for others."""

    def __init__(
        self,
        store: ExpertStore,
        cache: SlotHolder,
        products: Products,
        reference: Reference,
    ) -> None:
        self._cache = cache
        self._products = products
        self._reference = reference
        self._tail = store.tail
        self._plain: dict[int, bool] = {}
        self._forms = store.forms()

    def token(
        self, experts: Any, layer: int, hidden: Tensor, rows: list[int], weights: list[float]
    ) -> Tensor:
        """[1, H]: `forward` for one token [1, H], its K rows and their weights."""
        chosen = sorted((row, place) for place, row in enumerate(rows) if row >= 0)
        if not chosen:
            return torch.zeros_like(hidden)
        members = [Member(row, number, number + 1) for number, (row, _) in enumerate(chosen)]
        results = []
        with closing(self._groups(layer, members)) as groups:
            for group in groups:
                result = self._outputs(experts, layer, hidden, group)
                is_whole = len(group.members) == len(members)
                results.append(result if is_whole else result.clone())
        scales = torch.tensor([[weights[place]] for _, place in chosen]).to(hidden.device)
        together = results[0] if len(results) == 1 else torch.cat(results)
        return together.mul_(scales).sum(0, keepdim=True).to(hidden.dtype)

    def forward(
        self, experts: Any, layer: int, hidden: Tensor, rows: Tensor, weights: Tensor
    ) -> Tensor:
        """Weighted sum [T, H] of the chosen experts' outputs.

        Args:
            experts: transformers' experts module of this layer.
            hidden: float [T, H] input of the MoE block.
            rows, weights: [T, K] the choice; row -1 is nobody.
        """
        pairs = Pairs.of(rows, weights)
        output = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        with closing(self._groups(layer, list(pairs.members()))) as groups:
            for group in groups:
                first, stop = group.members[0].start, group.members[-1].stop
                results = self._outputs(experts, layer, hidden, group, pairs.tokens[first:stop])
                self._products.add(output, results, pairs, first)
        return output.to(hidden.dtype)

    def close(self) -> None:
        """Free what C allocated."""
        self._products.close()

    def _groups(self, layer: int, members: Sequence[Member]) -> Generator[HeldExperts]:
        return held_groups(self._cache, layer, members, self._products.most_rows)

    def _outputs(
        self,
        experts: Any,
        layer: int,
        hidden: Tensor,
        group: HeldExperts,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """[R, H] un-gated, in the group's order; may be overwritten by the next call.

        `tokens` [R] says which row of `hidden` each pair takes; without it there is but one.
        """
        absent = group.absent()
        batches: dict[tuple[bool, str, str | None], list[Member]] = {}
        for member in group.members:
            form = self._forms[layer][member.row]
            batch = self._products.batch(form)
            kind = (member.row in absent, form if batch is None else "", batch)
            batches.setdefault(kind, []).append(member)
        if len(batches) == 1:
            group.wait_for(group.members)
            return self._of_batch(experts, layer, hidden, tokens, group.members, group)
        together = torch.empty(group.num_rows, hidden.shape[1], device=hidden.device)
        first = group.members[0].start
        for kind in sorted(batches, key=lambda kind: kind[0]):
            members = batches[kind]
            group.wait_for(members)
            places = torch.cat([torch.arange(m.start - first, m.stop - first) for m in members])
            places = places.to(hidden.device)
            of_batch = None if tokens is None else tokens[places]
            results = self._of_batch(experts, layer, hidden, of_batch, members, group)
            together[places] = results.float()
        return together

    def _of_batch(
        self,
        experts: Any,
        layer: int,
        hidden: Tensor,
        tokens: Tensor | None,
        members: list[Member],
        group: HeldExperts,
    ) -> Tensor:
        """[R, H] of experts that are computed in one call, or of one form by the reference."""
        chosen = Chosen(
            forms=[self._forms[layer][member.row] for member in members],
            slots=[group.slots[member.row] for member in members],
            lengths=[member.stop - member.start for member in members],
            tokens=tokens,
            num_tokens=len(hidden),
        )
        if self._products.batch(chosen.forms[0]) is None:
            return self._of_reference(experts, hidden, chosen, members, group)
        tail = tail_of(self._tail, chosen.forms[0])
        if tail is None and self._is_plain(experts):
            return self._products.gated(chosen, hidden)
        records = [] if tail is None else [group.packed(member) for member in members]
        rows = torch.from_numpy(np.repeat([member.row for member in members], chosen.lengths))
        rows = rows.to(hidden.device)
        gate_up = self._products.gate_up(chosen, hidden)
        if tail is not None:
            _add_signs(tail, records, FIRST, gate_up, _of_pairs(chosen, hidden), chosen.lengths)
        inner = apply_gate(experts, gate_up, rows)
        outputs = self._products.down(chosen, inner)
        if tail is not None:
            _add_signs(tail, records, DOWN, outputs, inner, chosen.lengths)
        return add_down_bias(experts, outputs, rows)

    def _of_reference(
        self,
        experts: Any,
        hidden: Tensor,
        chosen: Chosen,
        members: list[Member],
        group: HeldExperts,
    ) -> Tensor:
        """[R, H] of experts in a form that `products` does not take."""
        pieces = torch.split(_of_pairs(chosen, hidden), list(chosen.lengths))
        return torch.cat(
            [
                self._reference(experts, form, group.packed(member), piece, member.row)
                for form, member, piece in zip(chosen.forms, members, pieces, strict=True)
            ]
        )

    def _is_plain(self, experts: Any) -> bool:
        """Whether an expert is down(silu(gate x) * up x), which `products` compute in one go.

        Asked of the module itself, at sizes where a family's limits would show.
        """
        known = self._plain.get(id(experts))
        if known is None:
            known = self._plain[id(experts)] = _multiplies_silu(experts)
        return known


def _add_signs(
    tail: DeltaTail,
    records: Sequence[Tensor],
    index: int,
    outputs: Tensor,
    inputs: Tensor,
    lengths: Sequence[int],
) -> None:
    """Add to `outputs` [R, ...] what the delta behind each expert's record makes of its inputs."""
    pieces = zip(
        records,
        torch.split(outputs, list(lengths)),
        torch.split(inputs, list(lengths)),
        strict=True,
    )
    for record, output, piece in pieces:
        output += delta_outputs(tail, record, index, piece)


def _of_pairs(chosen: Chosen, hidden: Tensor) -> Tensor:
    """[R, H] the inputs of every pair."""
    if chosen.tokens is None:
        return hidden.expand(chosen.num_pairs, -1)
    return hidden[chosen.tokens]


def _multiplies_silu(experts: Any) -> bool:
    if experts.has_bias or not experts.has_gate or not experts.is_concatenated:
        return False
    gate, up = torch.linspace(-50.0, 50.0, 2 * _PROBES).view(2, _PROBES)
    probe = torch.stack([torch.cat([gate, up]), torch.cat([up, gate])])
    expected = F.silu(probe[:, :_PROBES]) * probe[:, _PROBES:]
    return torch.allclose(apply_gate(experts, probe, 0), expected, rtol=1e-5, atol=1e-5)
