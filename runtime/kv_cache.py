"""A KV cache that takes its memory once: transformers' own grows by copying itself every token.

`DynamicCache` concatenates, so that each step moves the whole cache and leaves freed pieces behind
in the allocator. Here each layer has one buffer for the longest sequence; pages that no token has
reached are not in memory yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from edge_moe.errors import InputError
from edge_moe.families import FAMILIES


class PreallocatedLayer(DynamicLayer):
    """Keys and values [1, kv heads, context, head width] of one layer, filled from the front."""

    def __init__(self, context_tokens: int, *, is_zeroed: bool = False) -> None:
        """`is_zeroed`: on a CPU, too, where pages that no token reached take no memory else."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_zeroed = is_zeroed
        self._context_tokens = context_tokens
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._num_tokens = 0
        self._fixed: tuple[Tensor, int] | None = None

    def fix(self, position: Tensor | None, length: int) -> None:
        """Write where `position` (int64, one value) says and give back `length` places.

        For captured graphs: memory and shapes are the same for every token. Nothing is appended
        then, but by `advance`; None goes back to that. There must be something in the cache.
        """
        self._fixed = None if position is None else (position.view(1), length)

    def advance(self) -> None:
        """Count the token that was written at a fixed position."""
        self._num_tokens += 1
        if self._buffers is not None:
            self.keys, self.values = (buffer[:, :, : self._num_tokens] for buffer in self._buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [1, kv heads, T, head width] each; everything so far, as views.

        Raises:
            InputError: more tokens than the context.
        """
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            self._buffers = self._empty_like(key_states), self._empty_like(value_states)
        if self._fixed is not None:
            position, length = self._fixed
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, position, states)
            keys, values = (buffer[:, :, :length] for buffer in self._buffers)
            return keys, values
        start, end = self._num_tokens, self._num_tokens + key_states.shape[-2]
        if end > self._context_tokens:
            raise InputError(f"{end} tokens exceed the context of {self._context_tokens}")
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self._num_tokens = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def _empty_like(self, states: Tensor) -> Tensor:
        batch, heads, _, width = states.shape
        shape = batch, heads, self._context_tokens, width
        # a fixed length looks at places that nothing was written to: they must not be NaN
        is_looked_at = self._is_zeroed or states.device.type == "cuda"
        return states.new_zeros(shape) if is_looked_at else states.new_empty(shape)


def make_cache(config: Any, context_tokens: int, *, is_zeroed: bool = False) -> Any:
    """transformers' cache for `config`, its plain layers preallocated for `context_tokens`.

    Layers with a sliding window keep transformers' own kind: they are short. transformers makes
    them for every config.json with `sliding_window`, and forgets tokens that a family without
    windows attends to; here those are plain.
    """
    plain: set[type] = {DynamicLayer}
    if FAMILIES[config.model_type].windows == "no layer":
        plain.add(DynamicSlidingWindowLayer)
    cache = DynamicCache(config=config)
    cache.layers = [
        PreallocatedLayer(context_tokens, is_zeroed=is_zeroed) if type(layer) in plain else layer
        for layer in cache.layers
    ]
    return cache


def cached_tensors(cache: Any) -> Iterator[Tensor]:
    """What is cached so far: keys and values, and the states of layers that keep one instead."""
    for layer in cache.layers:
        held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        for name in ("conv_states", "recurrent_states"):
            held += getattr(layer, name, {}).values()
        yield from (tensor for tensor in held if tensor is not None)


def share_key_value_heads(device: torch.device) -> None:
    """Let torch's attention read grouped key and value heads without copying them to every head.

    Same results; on a CPU transformers would repeat the whole cache for every chunk of a prompt.
    On CUDA torch's fast kernels refuse masks with grouped heads, so nothing changes there. A value
    that the user set stays.
    """
    if device.type == "cpu":
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
