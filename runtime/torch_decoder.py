"""A sequence through a torch model and its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edge_moe.runtime.generate import FloatArray, TokenLoop
from edge_moe.runtime.interleaved_trial import InterleavedTrial


class Decoder(TokenLoop):
    """A sequence through a torch model and its KV cache."""

    def __init__(
        self,
        model: Any,
        device: torch.device,
        context_tokens: int,
        trial: InterleavedTrial | None = None,
    ) -> None:
        """`trial` is told when a token is computed on its own, and when it is there."""
        from edge_moe.runtime.kv_cache import make_cache

        super().__init__(context_tokens)
        self.model = model
        self._trial = trial
        self.device = device
        self.cache = make_cache(model.config, context_tokens)

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int], *, keep_all: bool = False) -> FloatArray:
        trial = self._trial if len(token_ids) == 1 else None
        if trial is not None:
            trial.start_token()
        inputs = torch.tensor([list(token_ids)], device=self.device)
        output = self.model(
            input_ids=inputs,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=0 if keep_all else 1,
        )
        self.num_tokens += len(token_ids)
        logits: FloatArray = output.logits[0].float().cpu().numpy()
        if trial is not None:
            trial.end_token()
        return logits

    def cache_bytes(self) -> int:
        """Bytes of the keys, values and states that the cache holds."""
        from edge_moe.runtime.kv_cache import cached_tensors

        return sum(tensor.nbytes for tensor in cached_tensors(self.cache))
