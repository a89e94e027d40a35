"""Layers whose experts are computed from bodies and shadows, as `runtime.stalls` says.

Shapes: T tokens, K top_k, H hidden_size.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from edge_moe.runtime.body_reader import BodyReader
from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.policy import Key
from edge_moe.runtime.shadow_store import BodyStore
from edge_moe.runtime.stalls import Allowance, Miss, StallOptions

Tensor = torch.Tensor


class Computes(Protocol):
    """Computes experts out of one cache: `ExpertPager`."""

    cache: ExpertCache

    def compute(
        self, experts: Any, layer: int, hidden: Tensor, rows: Tensor, weights: Tensor
    ) -> Tensor:
        """[T, H] for [T, H] and the choice [T, K] of both; row -1 is nobody."""


class ShadowExperts:
    """Decides, expert by expert, which of the two is computed. Belongs to the model's thread."""

    def __init__(
        self,
        bodies: Computes,
        shadows: Computes,
        store: BodyStore,
        reader: BodyReader,
        options: StallOptions,
    ) -> None:
        """`bodies` are those of `store`; every shadow is in memory."""
        self._bodies = bodies
        self._shadows = shadows
        self._cache = bodies.cache
        self._store = store
        self._reader = reader
        self._allowed_seconds = options.allowed_seconds
        self._allowance = Allowance(len(store.kept))
        self._layer = len(store.kept)
        """The last one that was computed."""

    def forward(
        self, experts: Any, layer: int, hidden: Tensor, rows: Tensor, weights: Tensor
    ) -> Tensor:
        """[T, H]: the weighted sum of the chosen experts' outputs, [T, H] and [T, K] of both.

        Several tokens are a prompt, which waits for all bodies.
        """
        own = self._store.own_shadows[layer]
        if len(hidden) > 1:
            is_shadow = torch.isin(rows, torch.tensor(sorted(own), device=rows.device))
            self._cache.statistics.hits += len(torch.unique(rows[is_shadow]))
            return self._both(experts, layer, hidden, rows, weights, is_shadow)
        if layer <= self._layer:
            self._reader.start_token()
            self._allowance.start_token()
        self._layer = layer
        return self._token(experts, layer, hidden, rows, weights)

    def _token(
        self, experts: Any, layer: int, hidden: Tensor, rows: Tensor, weights: Tensor
    ) -> Tensor:
        own, gates = self._store.own_shadows[layer], weights[0].tolist()
        chosen = {row: gate for row, gate in zip(rows[0].tolist(), gates, strict=True) if row >= 0}
        wanted = [(layer, row) for row in chosen if row not in own]
        arrived = self._cache.arrived(wanted)
        misses = [
            Miss(key, chosen[key[1]], self._store.record(key).num_bytes)
            for key in wanted
            if key not in arrived
        ]
        awaited = self._awaited(layer, misses)
        late = [miss for miss in misses if miss.key not in awaited]
        self._count(chosen, late)
        shadows = [row for row in chosen if row in own] + [miss.key[1] for miss in late]
        is_shadow = torch.isin(rows, torch.tensor(shadows, device=rows.device))
        output = self._both(experts, layer, hidden, rows, weights, is_shadow)
        self._reader.want(late)  # which is all that evicts besides waiting for misses
        self._count_stalls()
        return output

    def _awaited(self, layer: int, misses: list[Miss]) -> list[Key]:
        if not self._allowed_seconds:
            return []
        bytes_per_token = self._allowed_seconds * self._reader.bytes_per_second
        return self._allowance.grant(layer, misses, bytes_per_token)

    def _both(
        self,
        experts: Any,
        layer: int,
        hidden: Tensor,
        rows: Tensor,
        weights: Tensor,
        is_shadow: Tensor,
    ) -> Tensor:
        """Shadows where `is_shadow` [T, K] says so, bodies elsewhere."""
        is_body = ~is_shadow & (rows >= 0)
        if not is_shadow.any():
            return self._bodies.compute(experts, layer, hidden, rows, weights)
        light = self._shadows.compute(experts, layer, hidden, rows.where(is_shadow, -1), weights)
        if not is_body.any():
            return light
        return light + self._bodies.compute(
            experts, layer, hidden, rows.where(is_body, -1), weights
        )

    def _count(self, chosen: dict[int, float], late: list[Miss]) -> None:
        statistics = self._cache.statistics
        statistics.hits += sum(row in self._store.own_shadows[self._layer] for row in chosen)
        statistics.misses += len(late)
        statistics.shadow_experts += len(late)
        statistics.shadow_weight += sum(abs(miss.weight) for miss in late)
        statistics.decoded_weight += sum(map(abs, chosen.values()))

    def _count_stalls(self) -> None:
        """A device tells them to whichever cache asks first."""
        told = self._shadows.cache.statistics
        self._cache.statistics.stall_seconds += told.stall_seconds
        told.stall_seconds = 0.0
