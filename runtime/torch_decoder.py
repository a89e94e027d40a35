"""A sequence through a torch model and its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edge_moe.runtime.dense_graphs import DenseGraphs
from edge_moe.runtime.generate import FloatArray, TokenLoop
from edge_moe.runtime.interleaved_trial import InterleavedTrial
from edge_moe.runtime.read_ahead import ReadAhead


class Decoder(TokenLoop):
    """A sequence through a torch model and its KV cache."""

    def __init__(
        self,
        model: Any,
        device: torch.device,
        context_tokens: int,
        *,
        trial: InterleavedTrial | None = None,
        graphs: DenseGraphs | None = None,
        read_ahead: ReadAhead | None = None,
    ) -> None:
        """`trial` is told when a token is computed on its own, and when it is there.

        So is `read_ahead`, whose own trial begins when the others are over. Where `graphs` are
        there, single tokens are replayed from them; whether that pays is tried first.
        """
        from edge_moe.runtime.kv_cache import make_cache

        super().__init__(context_tokens)
        self.model = model
        self._trials = [graphs.trial if graphs is not None else None, trial]
        self._graphs = graphs
        self._read_ahead = read_ahead
        self.device = device
        self.cache = make_cache(model.config, context_tokens, is_zeroed=graphs is not None)
        self._graphed = graphs.start(self.cache) if graphs is not None else None

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int], *, keep_all: bool = False) -> FloatArray:
        trial = self._open_trial() if len(token_ids) == 1 else None
        if trial is not None:
            trial.start_token()
        ahead = self._read_ahead if len(token_ids) == 1 else None
        if ahead is not None:
            is_settled = trial is None or trial.verdict is not None
            ahead.start_token(token_ids[0], is_settled=is_settled)
        logits = self._replayed(token_ids)
        if logits is None:
            logits = self._computed(token_ids, keep_all)
        self.num_tokens += len(token_ids)
        found: FloatArray = logits.float().cpu().numpy()
        if trial is not None:
            trial.end_token()
        if ahead is not None:
            ahead.end_token()
        return found

    def _replayed(self, token_ids: Sequence[int]) -> torch.Tensor | None:
        """[1, V], or None where the token has to be computed as usual."""
        if self._graphed is None or self._graphs is None or len(token_ids) > 1:
            return None
        if not self._graphs.is_on:
            return None
        logits = self._graphed.step(token_ids[0])
        return None if logits is None else logits[None]

    def _computed(self, token_ids: Sequence[int], keep_all: bool) -> torch.Tensor:
        """[1 or T, V]"""
        inputs = torch.tensor([list(token_ids)], device=self.device)
        output = self.model(
            input_ids=inputs,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=0 if keep_all else 1,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _open_trial(self) -> InterleavedTrial | None:
        """One after another: two at once would be mistaken for each other."""
        if self._graphed is None or self._graphed.reason:
            return self._trials[1]
        return next((each for each in self._trials if each and each.verdict is None), None)

    def cache_bytes(self) -> int:
        """Bytes of the keys, values and states that the cache holds."""
        from edge_moe.runtime.kv_cache import cached_tensors

        return sum(tensor.nbytes for tensor in cached_tensors(self.cache))
