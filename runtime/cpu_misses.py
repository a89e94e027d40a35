"""Some of a token's missed experts computed on the CPU, where they lie in RAM, beside the device.

They take no slot and cross no link. Letters: K top_k, H hidden_size of the experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.fetch_choice import Miss, MissChooser
from edge_moe.runtime.host_tier import HostTier
from edge_moe.runtime.kernel_choice import KernelChoice
from edge_moe.runtime.packed_experts import Reference, SlotExperts
from edge_moe.runtime.policy import Key
from edge_moe.spec import ModelSpec

Tensor = torch.Tensor


class HostExperts:
    """Computes experts of the host tier, packed where libggml knows their form."""

    def __init__(
        self,
        spec: ModelSpec,
        store: ExpertStore,
        host: HostTier,
        kernels: KernelChoice | None,
        reference: Reference,
    ) -> None:
        """Without packed kernels no library is needed, and `reference` computes all."""
        self._store = store
        self._host = host
        self._reference = reference
        self._packed = None
        products = None
        if kernels is not None:
            products = kernels.new_products(spec, host.buffers, store.tail)
        if products is not None:
            self._packed = SlotExperts(store, host, products, reference)
        self._modules: dict[int, Any] = {}

    def token(
        self, experts: Any, layer: int, hidden: Tensor, rows: list[int], weights: list[float]
    ) -> Tensor:
        """Weighted sum [1, H] of the experts `rows`, which the caller holds, for one token.

        Args:
            experts: transformers' experts module of this layer, on any device.
            hidden: float32 [1, H] on the CPU.
        """
        module = self._on_cpu(experts, layer)
        if self._packed is not None:
            return self._packed.token(module, layer, hidden, rows, weights)
        output = torch.zeros_like(hidden)
        for row, weight in zip(rows, weights, strict=True):
            key = (layer, row)
            packed = self._host.hold(key)
            if packed is None:
                raise RuntimeError(f"expert {key} left RAM while it was held")
            try:
                form = self._store.record(key).form
                output += weight * self._reference(module, form, packed, hidden, row)
            finally:
                self._host.let_go(key, None)
        return output

    def close(self) -> None:
        """Free what C allocated."""
        if self._packed is not None:
            self._packed.close()

    def _on_cpu(self, experts: Any, layer: int) -> Any:
        """The module with its biases on the CPU: a copy where they are elsewhere."""
        if layer not in self._modules:
            module = experts
            if any(value.device.type != "cpu" for value in experts.parameters()):
                module = copy.copy(experts)
                module._parameters = {
                    name: None if value is None else torch.nn.Parameter(value.cpu(), False)
                    for name, value in experts._parameters.items()
                }
            self._modules[layer] = module
        return self._modules[layer]


@dataclass(frozen=True)
class Pending:
    """Experts that the CPU is computing."""

    rest: list[int]
    """[K] the token's rows without them: -1 in their places."""
    result: Future[Tensor]

    def add_to(self, output: Tensor) -> Tensor:
        """`output` [1, H] of the rest, and what the CPU found, which is waited for."""
        return output.add_(self.result.result().to(output.device, output.dtype))


class CpuMisses:
    """Asks the chooser for every layer of a token; one per session, for the model's thread."""

    def __init__(
        self,
        store: ExpertStore,
        cache: ExpertCache,
        host: HostTier,
        experts: HostExperts,
        chooser: MissChooser,
        queued_bytes: Callable[[], int],
    ) -> None:
        """`queued_bytes`: what is on its way over the link, or waits for it."""
        self.chooser = chooser
        self.host_experts = experts
        self._store = store
        self._cache = cache
        self._host = host
        self._queued_bytes = queued_bytes
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="edge-moe-cpu-experts")

    def start(
        self, experts: Any, layer: int, hidden: Tensor, rows: list[int], weights: list[float]
    ) -> Pending | None:
        """Have the CPU compute what it should of a token's `rows` [K]; None where that is nothing.

        `hidden` is [1, H] on the device; row -1 is nobody.
        """
        missing = [(layer, row) for row in rows if row >= 0 and not self._is_resident(layer, row)]
        if not missing:
            return None
        misses = [
            (key, Miss(self._store.record(key).num_bytes, self._host.has(key))) for key in missing
        ]
        chosen = self.chooser.choose(misses, self._queued_bytes())
        if not chosen or self._host.acquire_residents(chosen) is None:
            return None  # one of them has just left RAM
        self._cache.count_elsewhere(chosen)
        taken = {row for _, row in chosen}
        pairs = [(row, weight) for row, weight in zip(rows, weights, strict=True) if row in taken]
        result = self.submit(experts, layer, hidden, pairs, chosen)
        return Pending([-1 if row in taken else row for row in rows], result)

    def submit(
        self,
        experts: Any,
        layer: int,
        hidden: Tensor,
        pairs: Sequence[tuple[int, float]],
        held: Sequence[Key],
    ) -> Future[Tensor]:
        """Compute (row, weight) `pairs` on the CPU; `held` are let go of afterwards."""
        inputs = hidden.float().cpu()
        return self._worker.submit(self._compute, experts, layer, inputs, pairs, held)

    def idle(self, hidden: Tensor) -> Future[Tensor]:
        """The way to the CPU and back without any work: its inputs."""
        inputs = hidden.float().cpu()
        return self._worker.submit(lambda: inputs)

    def close(self) -> None:
        """Finish what is being computed, and free what C allocated."""
        self._worker.shutdown()
        self.host_experts.close()

    def _is_resident(self, layer: int, row: int) -> bool:
        return self._cache.is_resident((layer, row))

    def _compute(
        self,
        experts: Any,
        layer: int,
        hidden: Tensor,
        pairs: Sequence[tuple[int, float]],
        held: Sequence[Key],
    ) -> Tensor:
        rows, weights = [row for row, _ in pairs], [weight for _, weight in pairs]
        try:
            with torch.inference_mode():
                return self.host_experts.token(experts, layer, hidden, rows, weights)
        finally:
            self._host.release_residents(held)
