"""The experts of every MoE layer, computed from slots: transformers' experts interface, paged.

Shapes: T tokens, K top_k, H hidden_size, I expert_width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from edge_moe.formats import expert_packed_bytes
from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.kernels.unpack import unpack
from edge_moe.runtime.model import EXPERTS_IMPLEMENTATION
from edge_moe.runtime.prefetch import Prefetcher
from edge_moe.spec import ModelSpec

Tensor = torch.Tensor


class ExpertPager:
    """Runs experts out of an `ExpertCache`; one per session."""

    def __init__(
        self,
        spec: ModelSpec,
        store: ExpertStore,
        cache: ExpertCache,
        dtype: torch.dtype,
        prefetcher: Prefetcher | None,
    ) -> None:
        self._spec = spec
        self._store = store
        self._cache = cache
        self._dtype = dtype
        self._prefetcher = prefetcher

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
        if len(hidden) == 1:
            return self._forward_token(experts, layer, hidden, rows[0].tolist(), weights[0])
        output = torch.zeros_like(hidden)
        for row in torch.unique(rows).tolist():
            tokens, places = torch.nonzero(rows == row, as_tuple=True)
            scale = weights[tokens, places, None].to(hidden.dtype)
            result = self._one_expert(experts, (layer, row), hidden[tokens])
            output.index_add_(0, tokens, result.mul_(scale))
        return output

    def _forward_token(
        self, experts: Any, layer: int, hidden: Tensor, rows: list[int], weights: Tensor
    ) -> Tensor:
        """The decoding case: one token [1, H], read-ahead for the next layer."""
        if self._prefetcher is not None:
            self._prefetcher.observe(layer, rows)
            self._prefetcher.predict(layer, hidden, rows)
        output = torch.zeros_like(hidden)
        scales = weights.to(hidden.dtype)
        for row, place in sorted((row, place) for place, row in enumerate(rows)):
            result = self._one_expert(experts, (layer, row), hidden)
            output.add_(result.mul_(scales[place]))
        return output

    def _one_expert(self, experts: Any, key: tuple[int, int], inputs: Tensor) -> Tensor:
        """[t, H] -> [t, H], un-gated output of one expert."""
        packed = self._cache.acquire(key)
        try:
            gate_up, down = self._unpack(self._store.record(key).form, packed)
            return functional.linear(experts._apply_gate(functional.linear(inputs, gate_up)), down)
        finally:
            self._cache.release(key)

    def _unpack(self, form: str, packed: Tensor) -> tuple[Tensor, Tensor]:
        """(gate_up_proj [2I, H], down_proj [H, I]) in the compute dtype."""
        spec = self._spec
        gate_bytes, up_bytes, _ = expert_packed_bytes(form, spec.hidden_size, spec.expert_width)
        both = gate_bytes + up_bytes
        gate_up = packed[:both].view(2 * spec.expert_width, -1)
        down = packed[both:].view(spec.hidden_size, -1)
        return (
            unpack(form, gate_up, spec.hidden_size).to(self._dtype),
            unpack(form, down, spec.expert_width).to(self._dtype),
        )


def attach(blocks: list[Any], pager: ExpertPager) -> None:
    """Make the experts of `blocks` run through `pager`; drop their meta weights."""
    for layer, block in enumerate(blocks):
        block.experts._parameters.clear()
        object.__setattr__(block.experts, "edge_moe_pager", pager)
        block.experts.edge_moe_layer = layer


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
