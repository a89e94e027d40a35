"""The experts of every MoE layer, computed from slots: transformers' experts interface, paged.

Shapes: T tokens, K top_k, H hidden_size, I expert_width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_moe.formats import expert_packed_bytes
from edge_moe.runtime.ahead_reader import AheadReader
from edge_moe.runtime.allotment import record_sizes
from edge_moe.runtime.cpu_misses import CpuMisses
from edge_moe.runtime.delta_products import DOWN, FIRST, add_delta
from edge_moe.runtime.delta_tail import tail_of
from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.held_experts import held_groups
from edge_moe.runtime.held_interrupts import HeldInterrupts
from edge_moe.runtime.kernels.unpack import unpack
from edge_moe.runtime.model import EXPERTS_IMPLEMENTATION
from edge_moe.runtime.moe_block import MODULE_STACKS, MoeBlock, expert_output
from edge_moe.runtime.packed_experts import SlotExperts
from edge_moe.runtime.policy import Key
from edge_moe.runtime.pre_gated_routing import PreGatedRouting
from edge_moe.runtime.products import Member
from edge_moe.runtime.shadow_experts import ShadowExperts
from edge_moe.runtime.skipping import SkipRule
from edge_moe.runtime.trace import TraceRecorder
from edge_moe.spec import ModelSpec

Tensor = torch.Tensor
Ranker = Callable[[int, Tensor], list[int]]
"""(layer, its input [1, H]) -> rows of the next layer, likeliest first."""


class ExpertPager:
    """Runs experts out of an `ExpertCache`; one per session."""

    def __init__(
        self,
        spec: ModelSpec,
        store: ExpertStore,
        cache: ExpertCache,
        prefetcher: AheadReader | None,
        skip: SkipRule | None = None,
        routing: PreGatedRouting | None = None,
    ) -> None:
        self._spec = spec
        self.store = store
        self.cache = cache
        self.prefetcher = prefetcher
        self._skip = skip
        self._routing = routing
        self._interrupts = HeldInterrupts()
        self._sizes = [np.array(layer) for layer in record_sizes(store)]
        self.packed: SlotExperts | None = None
        """What computes experts without unpacking them, where it was chosen."""
        self.misses: CpuMisses | None = None
        """What computes missed experts on the CPU, beside a GPU."""
        self.shadowed: ShadowExperts | None = None
        """What computes some of the experts from their shadows, where there are any in memory."""
        self.recorder: TraceRecorder | None = None
        """Where the routers' choices are written down, while somebody wants them."""
        self.rankers: Mapping[str, Ranker] = {}
        """What guesses the next layer's rows, to be written down beside them."""

    def forward(
        self, experts: Any, layer: int, hidden: Tensor, rows: Tensor, weights: Tensor
    ) -> Tensor:
        """Weighted sum of the chosen experts' outputs.

        Args:
            hidden: [T, H] input of the MoE block.
            rows: [T, K] chosen router rows.
            weights: [T, K] their weights, as the router gave them.

        Returns: [T, H]
        """
        with self._interrupts.hold():  # else an expert could stay pinned for good
            if self._routing is not None:
                rows, weights = self._routing.choice(layer, rows, weights)
            rows, weights = self._chosen(layer, hidden, rows, weights)
            if self.shadowed is not None:
                return self.shadowed.forward(experts, layer, hidden, rows, weights)
            if len(hidden) == 1 and self.prefetcher is not None:
                self._read_ahead(self.prefetcher, layer, hidden, rows[0].tolist())
            return self.compute(experts, layer, hidden, rows, weights)

    def compute(
        self, experts: Any, layer: int, hidden: Tensor, rows: Tensor, weights: Tensor
    ) -> Tensor:
        """`forward` for experts that are chosen for good; row -1 is nobody."""
        if len(hidden) == 1:
            return self._token(experts, layer, hidden, rows[0].tolist(), weights[0].tolist())
        if self.packed is not None:
            return self.packed.forward(experts, layer, hidden, rows, weights)
        output = torch.zeros_like(hidden)
        self._add_tokens(output, experts, layer, hidden, rows, weights)
        return output

    def close(self) -> None:
        """Free what C allocated; the cache is the caller's."""
        for part in (self.packed, self.misses):
            if part is not None:
                part.close()
        self.packed = self.misses = None  # they call the pager: slots would stay until a collection

    def _token(
        self, experts: Any, layer: int, hidden: Tensor, rows: list[int], weights: list[float]
    ) -> Tensor:
        """One token [1, H], some of whose experts the CPU may compute beside the others."""
        pending = None
        if self.misses is not None:
            pending = self.misses.start(experts, layer, hidden, rows, weights)
        rest = pending.rest if pending is not None else rows
        if self.packed is not None:
            output = self.packed.token(experts, layer, hidden, rest, weights)
        else:
            output = torch.zeros_like(hidden)
            self._add_token(output, experts, layer, hidden, rest, weights)
        return pending.add_to(output) if pending is not None else output

    def _read_ahead(
        self, prefetcher: AheadReader, layer: int, hidden: Tensor, rows: list[int]
    ) -> None:
        """For the next layer, given one token [1, H]."""
        asked = sorted(row for row in rows if row >= 0)
        prefetcher.observe(layer, asked)
        prefetcher.predict(layer, hidden, asked)

    def _add_tokens(
        self,
        output: Tensor,
        experts: Any,
        layer: int,
        hidden: Tensor,
        rows: Tensor,
        weights: Tensor,
    ) -> None:
        """The prefilling case: one expert after another."""
        asked = torch.unique(rows[rows >= 0]).tolist()
        with closing(self._held(layer, asked)) as held:
            for row, packed in held:
                tokens, places = torch.nonzero(rows == row, as_tuple=True)
                scale = weights[tokens, places, None].to(hidden.dtype)
                result = self._one_expert(experts, (layer, row), packed, hidden[tokens])
                output.index_add_(0, tokens, result.mul_(scale))

    def _add_token(
        self,
        output: Tensor,
        experts: Any,
        layer: int,
        hidden: Tensor,
        rows: list[int],
        weights: list[float],
    ) -> None:
        """The decoding case: one token [1, H]."""
        scales = dict(zip(rows, torch.tensor(weights).to(hidden.dtype).tolist(), strict=True))
        with closing(self._held(layer, sorted(row for row in rows if row >= 0))) as held:
            for row, packed in held:
                result = self._one_expert(experts, (layer, row), packed, hidden)
                output.add_(result.mul_(scales[row]))

    def _chosen(
        self, layer: int, hidden: Tensor, rows: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(rows, weights), [T, K] each, after skipping: row -1 and weight 0 where one is skipped.

        Counts, and writes down the router's own choice while that is wanted.
        """
        self.cache.statistics.routed_experts += rows.numel()
        if self._skip is None and self.recorder is None:
            return rows, weights
        ids, gates = rows.cpu().numpy(), weights.float().cpu().numpy()
        norms = None
        if self.recorder is not None or (self._skip is not None and self._skip.needs_token_norms):
            norms = hidden.float().abs().sum(dim=1).cpu().numpy()
        if self.recorder is not None and norms is not None:
            self.recorder.add(layer, ids, gates, norms)
            self._write_guesses(self.recorder, layer, hidden)
        if self._skip is None:
            return rows, weights
        self.cache.statistics.routed_bytes += int(self._sizes[layer][ids].sum())
        is_skipped = self._skip.skips(layer, gates, norms)
        if not is_skipped.any():
            return rows, weights
        self._count_skipped(layer, ids, is_skipped)
        remaining = torch.from_numpy(self._skip.remaining(gates, is_skipped))
        chosen = torch.from_numpy(np.where(is_skipped, -1, ids))
        return chosen.to(rows), remaining.to(weights)

    def _write_guesses(self, recorder: TraceRecorder, layer: int, hidden: Tensor) -> None:
        """Of single tokens, whose experts can be read ahead."""
        if len(hidden) > 1 or layer + 1 == len(self.store.kept):
            return
        for name, rank in self.rankers.items():
            recorder.add_guess(name, layer + 1, rank(layer, hidden))

    def _count_skipped(
        self, layer: int, ids: npt.NDArray[np.int64], is_skipped: npt.NDArray[np.bool_]
    ) -> None:
        statistics, sizes = self.cache.statistics, self._sizes[layer]
        statistics.skipped_experts += int(is_skipped.sum())
        statistics.skipped_bytes += int(sizes[ids[is_skipped]].sum())
        for row in np.setdiff1d(ids[is_skipped], ids[~is_skipped]).tolist():
            if not self.cache.is_resident((layer, row)):
                statistics.not_paged_bytes += int(sizes[row])

    def _held(self, layer: int, rows: Sequence[int]) -> Generator[tuple[int, Tensor]]:
        """Each of the ascending `rows` with its packed expert, which stays until the next."""
        members = [Member(row, number, number + 1) for number, row in enumerate(rows)]
        with closing(held_groups(self.cache, layer, members)) as groups:
            for group in groups:
                for member in group.members:
                    group.wait_for([member])
                    yield member.row, group.packed(member)

    def _one_expert(self, experts: Any, key: Key, packed: Tensor, inputs: Tensor) -> Tensor:
        """[t, H] -> [t, H], un-gated output of one expert."""
        return self.unpacked_output(experts, self.store.record(key).form, packed, inputs, key[1])

    def unpacked_output(
        self, experts: Any, form: str, packed: Tensor, inputs: Tensor, row: int
    ) -> Tensor:
        """[t, H] -> [t, H], un-gated output of the expert in `packed`, unpacked for it.

        On the device that both are on, in the dtype of `inputs`.
        """
        gate_up, down = self._unpack(form, packed, inputs.dtype)
        return expert_output(experts, inputs, gate_up, down, row)

    def _unpack(self, form: str, packed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(gate_up_proj [2I, H], down_proj [H, I])"""
        spec = self._spec
        gate_bytes, up_bytes, down_bytes = expert_packed_bytes(form, *spec.expert_shape)
        both = gate_bytes + up_bytes
        packed_down = packed[both : both + down_bytes].view(spec.expert_hidden, -1)
        gate_up = unpack(form, packed[:both].view(spec.inner_rows, -1), spec.expert_hidden)
        down = unpack(form, packed_down, spec.expert_width)
        tail = tail_of(self.store.tail, form)
        if tail is not None:
            add_delta(tail, packed, FIRST, gate_up)
            add_delta(tail, packed, DOWN, down)
        return gate_up.to(dtype), down.to(dtype)


def attach(blocks: list[MoeBlock], pager: ExpertPager) -> None:
    """Make the experts of `blocks` run through `pager`; drop their meta weights."""
    for layer, block in enumerate(blocks):
        for name in MODULE_STACKS:
            block.experts._parameters.pop(name, None)
        object.__setattr__(block.experts, "edge_moe_pager", pager)
        block.experts.edge_moe_layer = layer


def detach(blocks: list[MoeBlock]) -> None:
    """Undo `attach`: nothing but its owner holds the pager any more."""
    for block in blocks:
        object.__setattr__(block.experts, "edge_moe_pager", None)


def register_experts() -> None:
    """Teach transformers the paged experts implementation; must come before a model is built."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _paged_forward)


def _paged_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    output: Tensor = self.edge_moe_pager.forward(
        self, self.edge_moe_layer, hidden_states, top_k_index, top_k_weights
    )
    return output
