"""Reading ahead: the next layer's router on this layer's input guesses the next experts.

One background thread reads what the admission rule lets through. With everything resident the
prefetcher does not exist; what it does never changes a result.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from typing import Protocol

import torch

from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.guesses import Guesses
from edge_moe.runtime.policy import Key
from edge_moe.runtime.skipping import SkipRule


class Chooser(Protocol):
    """A MoE block, as far as it can say which experts it would choose."""

    def choose(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, H] -> (router rows, weights), [T, k] each."""


class Prefetcher:
    """Predicts, admits and reads ahead. `observe` and `predict` belong to the model's thread."""

    def __init__(
        self,
        blocks: Sequence[Chooser],
        store: ExpertStore,
        cache: ExpertCache,
        skip: SkipRule | None = None,
    ) -> None:
        self._blocks = blocks
        self._store = store
        self._cache = cache
        self._skip = skip
        self._guesses = Guesses()
        self._queue: queue.SimpleQueue[tuple[Key, frozenset[Key]] | None] = queue.SimpleQueue()
        self._queued_bytes = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="edge-moe-prefetch", daemon=True)
        self._thread.start()

    def observe(self, layer: int, rows: list[int]) -> None:
        """The router of `layer` chose `rows`: score the guess that was made for it."""
        self._guesses.score(layer, rows, self._cache.statistics)

    def predict(self, layer: int, hidden: torch.Tensor, current: list[int]) -> None:
        """Guess the experts of the layer after `layer` from this layer's input [1, H].

        `current` are the rows that this layer is about to use: they are not evicted for a guess.
        """
        following = layer + 1
        if following >= len(self._blocks):
            return
        # the model's own: biases, groups and all
        chosen, weights = self._blocks[following].choose(hidden)
        rows = self._wanted(following, weights, chosen)
        misses = [row for row in rows if not self._cache.is_resident((following, row))]
        self._guesses.remember(following, misses)
        keep = frozenset([(following, row) for row in rows] + [(layer, row) for row in current])
        for row in misses:
            self._submit((following, row), keep)

    @property
    def queued_bytes(self) -> int:
        """Guessed experts that are being read, or will be."""
        return self._queued_bytes

    def close(self) -> None:
        """Stop the thread; what is being read is finished first."""
        self._queue.put(None)
        self._thread.join()

    def _wanted(self, layer: int, weights: torch.Tensor, chosen: torch.Tensor) -> list[int]:
        """Guessed rows of one token, [1, K], without those that would be skipped anyway."""
        rows: list[int] = chosen[0].tolist()
        if self._skip is None:
            return rows
        is_skipped = self._skip.skips(layer, weights.float().cpu().numpy())[0].tolist()
        return [row for row, skipped in zip(rows, is_skipped, strict=True) if not skipped]

    def _submit(self, key: Key, keep: frozenset[Key]) -> None:
        num_bytes = self._store.record(key).num_bytes
        with self._lock:
            if not self._guesses.rule.admits(key[0], num_bytes, self._queued_bytes):
                self._cache.statistics.prefetch_rejected += 1
                return
            self._queued_bytes += num_bytes
        self._queue.put((key, keep))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            key, keep = item
            num_bytes = self._store.record(key).num_bytes
            start, was_read = time.perf_counter(), False
            try:
                was_read = self._cache.prefetch(key, keep)
            finally:
                with self._lock:
                    self._queued_bytes -= num_bytes
                    if was_read:
                        self._guesses.rule.learn_transfer(num_bytes, time.perf_counter() - start)
