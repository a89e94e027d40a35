"""The predictor asks the next layer's own router, and reads ahead what it names."""

from __future__ import annotations

import time

import torch
from test_expert_cache import MemoryStore
from torch import Tensor

from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.policy import LeastRecentlyUsed
from edge_moe.runtime.prefetch import Prefetcher
from edge_moe.runtime.slots import SlotBuffers


class BiasedRouter:
    """Chooses by score + bias, as transformers' routers do: raw logits would name row 0."""

    def choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        rows = (hidden + torch.tensor([-9.0, 0.0, 5.0, 0.0])).topk(1).indices
        return rows, torch.ones(1, 1)


def test_the_routers_own_choice_is_read_ahead() -> None:
    store = MemoryStore()
    cache = ExpertCache(store, SlotBuffers({4: 2, 8: 2}, torch.device("cpu")), LeastRecentlyUsed)
    prefetcher = Prefetcher([BiasedRouter(), BiasedRouter()], store, cache)
    prefetcher.predict(0, torch.tensor([[1.0, 0.0, 0.0, 0.0]]), [0])
    deadline = time.monotonic() + 10
    while not cache.is_resident((1, 2)) and time.monotonic() < deadline:
        time.sleep(0.001)
    prefetcher.observe(1, [2])
    prefetcher.close()
    assert cache.is_resident((1, 2)) and not cache.is_resident((1, 0))
    assert cache.statistics.predicted_misses == cache.statistics.predicted_misses_used == 1
