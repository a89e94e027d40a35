"""Reading ahead where a pre-gate has decided already: every layer's experts are known, not guessed.

As soon as the first MoE layer knows its input, what all others will use is read, nearest layer
first. Where slots are too few, what is needed last waits until layers that are done have left.
"""

from __future__ import annotations

import threading

import torch

from edge_moe.runtime.ahead_reader import AheadReader
from edge_moe.runtime.background_reads import BackgroundReads, Read
from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.policy import Key
from edge_moe.runtime.pre_gated_routing import PreGatedRouting


class CertainPrefetcher(AheadReader):
    """Reads what `routing` has decided for the single token at hand."""

    def __init__(self, routing: PreGatedRouting, store: ExpertStore, cache: ExpertCache) -> None:
        self._routing = routing
        self._store = store
        self._cache = cache
        self._layer = 0
        """The layer at hand; what is needed before it, or in it, comes too late."""
        self._token = 0
        self._submitted: set[Key] = set()
        self._lock = threading.Lock()
        self._reads = BackgroundReads(cache, self._done)

    def observe(self, layer: int, rows: list[int]) -> None:
        """`layer` has come: with the first one a token begins."""
        with self._lock:
            self._layer = layer
            if layer == 0:
                self._token += 1
                self._submitted.clear()

    def predict(self, layer: int, hidden: torch.Tensor, current: list[int]) -> None:
        now = frozenset((layer, row) for row in current)
        coming = self._coming(layer)
        everything = now.union(coming)
        self._cache.expected = everything
        for key in coming:
            with self._lock:
                if key in self._submitted:
                    continue
                self._submitted.add(key)
            nearer = now.union(other for other in coming if other[0] <= key[0])
            self._reads.submit(self._read(key, everything, nearer))

    @property
    def queued_bytes(self) -> int:
        return self._reads.queued_bytes

    def close(self) -> None:
        self._cache.expected = frozenset()
        self._reads.close()

    def _coming(self, layer: int) -> list[Key]:
        """What the token at hand uses after `layer`, nearest first."""
        later = self._routing.coming(layer)
        return [(layer + ahead, row) for ahead, rows in enumerate(later, 1) for row in rows]

    def _read(self, key: Key, everything: frozenset[Key], nearer: frozenset[Key]) -> Read:
        """Rather something that no layer needs leaves for it than what a farther layer needs."""
        num_bytes, token = self._store.record(key).num_bytes, self._token
        return Read(
            *(key, num_bytes, (everything, nearer)),
            lambda: token == self._token and key[0] > self._layer,
        )

    def _done(self, read: Read, seconds: float | None) -> None:
        """What found no slot is tried again when the next layer comes."""
        if seconds is None and not self._cache.is_resident(read.key):
            with self._lock:
                self._submitted.discard(read.key)
