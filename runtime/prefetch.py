"""Reading ahead: what predictors guess of the next layer's experts.

One background thread reads what the admission rule lets through. With everything resident the
prefetcher does not exist; what it does never changes a result.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from edge_moe.runtime.ahead_reader import AheadReader
from edge_moe.runtime.background_reads import BackgroundReads, Read
from edge_moe.runtime.block_predictors import BlockInput, NextChoice, NextRanking
from edge_moe.runtime.expert_cache import ExpertCache
from edge_moe.runtime.expert_store import ExpertStore
from edge_moe.runtime.guesses import JudgedGuesses
from edge_moe.runtime.interleaved_trial import FastestOf
from edge_moe.runtime.linear_map import LinearGuess, LinearMap
from edge_moe.runtime.moe_block import MoeBlock
from edge_moe.runtime.policy import Key
from edge_moe.runtime.predictor_choice import STATE_PREDICTORS, WIDE_GUESSES, id_predictor
from edge_moe.runtime.predictors import LINEAR_GUESSES, ROUTER_GUESSES, Predictor
from edge_moe.runtime.read_ahead import ReadAhead
from edge_moe.runtime.skipping import SkipRule
from edge_moe.spec import ModelSpec


class Prefetcher(AheadReader):
    """Predicts, admits and reads ahead. `observe` and `predict` belong to the model's thread."""

    def __init__(
        self,
        read_ahead: ReadAhead,
        block_input: BlockInput,
        store: ExpertStore,
        cache: ExpertCache,
    ) -> None:
        """`block_input` is what the predictors of `read_ahead` look at."""
        self.read_ahead: ReadAhead = read_ahead
        self._input = block_input
        self._store = store
        self._cache = cache
        self._guesses = JudgedGuesses()
        self._lock = threading.Lock()
        self._reads = BackgroundReads(cache, self._learn)

    def observe(self, layer: int, rows: list[int]) -> None:
        """The router of `layer` chose `rows`: score the guess that was made for it."""
        self._guesses.score(layer, rows, self._cache.statistics)

    def predict(self, layer: int, hidden: torch.Tensor, current: list[int]) -> None:
        """Guess the experts of the layer after `layer` from this layer's input [1, H].

        `current` are the rows that this layer is about to use: they are not evicted for a guess.
        """
        following = layer + 1
        self._input.hidden = hidden
        rows = self.read_ahead.guess(layer, current)
        self._input.hidden = None
        if not rows:
            return
        misses = [row for row in rows if not self._cache.is_resident((following, row))]
        self._guesses.remember(following, misses)
        keep = frozenset([(following, row) for row in rows] + [(layer, row) for row in current])
        for row in misses:
            self._submit((following, row), keep)

    @property
    def queued_bytes(self) -> int:
        """Guessed experts that are being read, or will be."""
        return self._reads.queued_bytes

    def close(self) -> None:
        """Stop the thread; what is being read is finished first."""
        self._reads.close()

    def _submit(self, key: Key, keep: frozenset[Key]) -> None:
        num_bytes = self._store.record(key).num_bytes
        with self._lock:
            if not self._guesses.rule.admits(key[0], num_bytes, self.queued_bytes):
                self._cache.statistics.prefetch_rejected += 1
                return
        self._reads.submit(Read(key, num_bytes, (keep,)))

    def _learn(self, read: Read, seconds: float | None) -> None:
        if seconds is None:
            return
        with self._lock:
            self._guesses.rule.learn_transfer(read.num_bytes, seconds)


def open_prefetcher(
    spec: ModelSpec,
    blocks: Sequence[MoeBlock],
    store: ExpertStore,
    cache: ExpertCache,
    names: Sequence[str],
    skip: SkipRule | None,
    linear: LinearMap | None,
    *,
    has_trial: bool,
) -> Prefetcher | None:
    """Reads what the predictors called `names` guess; None where none of them can.

    Without `has_trial` the first of them is always asked.
    """
    if spec.latent_width:  # its experts are not given what the next router would be
        names = [name for name in names if name not in STATE_PREDICTORS]
    if not names:
        return None
    block_input, num_rows = BlockInput(), [len(kept) for kept in store.kept]

    def predictor(name: str) -> Predictor:
        if name == ROUTER_GUESSES:
            return NextChoice(block_input, blocks, skip)
        if name == WIDE_GUESSES:
            return NextRanking(block_input, blocks, 2 * spec.top_k)
        if name == LINEAR_GUESSES and linear is not None:
            own = linear.for_experts(store.kept)
            return LinearGuess(block_input.values, own, spec.top_k)
        return id_predictor(name, num_rows, spec.top_k)

    predictors = {name: predictor(name) for name in names}
    trial = FastestOf(names) if has_trial else None
    return Prefetcher(ReadAhead(len(num_rows), predictors, trial), block_input, store, cache)
