"""Turning a prompt into text: prefill in chunks, decode token by token, stop in time."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_moe.budget import PREFILL_CHUNK_TOKENS
from edge_moe.errors import InputError
from edge_moe.runtime import memory

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the likeliest one."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Timing:
    """What one generation took."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    cached_tokens: int = 0
    cache_bytes: int = 0
    """What the KV cache held at the end, for `cached_tokens`."""
    stop_reason: str = ""
    """`eos`, `stop`, `length`, `context` or `interrupted`."""

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens after the first, per second of decoding."""
        decoded = max(0, self.generated_tokens - 1)
        return decoded / self.decode_seconds if self.decode_seconds else 0.0


class TokenLoop(ABC):
    """One sequence being generated: prefill in chunks, then token by token."""

    def __init__(self, context_tokens: int) -> None:
        self.context_tokens = context_tokens
        self.num_tokens = 0
        self.timing = Timing()

    @abstractmethod
    def step(self, token_ids: Sequence[int], *, keep_all: bool = False) -> FloatArray:
        """Feed tokens; float32 logits [1 or T, V] of the last or of every position."""

    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes of the tensors that the KV cache holds."""

    def logits(
        self,
        token_ids: Sequence[int],
        vocab_size: int,
        *,
        chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    ) -> FloatArray:
        """float32 [T, V]: row t predicts token t + 1. With `chunk_tokens` 1, as if generated.

        Raises:
            InputError: more tokens than the context holds.
        """
        if not 0 < len(token_ids) <= self.context_tokens:
            raise InputError(
                f"{len(token_ids)} tokens do not fit a context of {self.context_tokens}"
            )
        logits = np.empty((len(token_ids), vocab_size), np.float32)
        done = 0
        for chunk in chunks(token_ids, chunk_tokens):
            logits[done : done + len(chunk)] = self.step(chunk, keep_all=True)
            done += len(chunk)
        return logits

    def prefill(self, token_ids: Sequence[int]) -> FloatArray:
        """Feed the prompt in chunks; logits [V] of its last position."""
        start = time.perf_counter()
        logits: FloatArray = np.empty((1, 0), np.float32)
        for chunk in chunks(token_ids):
            logits = self.step(chunk)
        self.timing.prompt_tokens = len(token_ids)
        self.timing.prefill_seconds = time.perf_counter() - start
        last: FloatArray = logits[-1]
        return last

    def tokens(
        self, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling, eos: set[int]
    ) -> Iterator[int]:
        """New tokens one by one, without the end-of-text token.

        Afterwards freed memory goes back to the system: from answer to answer the allocator would
        keep more and more of it, 15 MB after a thousand.
        """
        try:
            yield from self._tokens(prompt_ids, max_new_tokens, sampling, eos)
        finally:
            memory.trim()
            self.timing.cached_tokens = self.num_tokens
            self.timing.cache_bytes = self.cache_bytes()

    def _tokens(
        self, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling, eos: set[int]
    ) -> Iterator[int]:
        generator = np.random.default_rng(sampling.seed)
        logits = self.prefill(prompt_ids)
        start = time.perf_counter()
        self.timing.stop_reason = "length"
        for _ in range(max_new_tokens):
            token = sample(logits, sampling, generator)
            self.timing.generated_tokens += 1
            self.timing.decode_seconds = time.perf_counter() - start
            if token in eos:
                self.timing.stop_reason = "eos"
                return
            yield token
            if self.timing.generated_tokens == max_new_tokens:
                return
            if self.num_tokens >= self.context_tokens:
                self.timing.stop_reason = "context"
                return
            logits = self.step([token])[-1]


def generate_text(
    loop: TokenLoop,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    eos: set[int],
    sampling: Sampling,
    max_new_tokens: int,
    stop: Sequence[str],
) -> Iterator[str]:
    """Text that follows `prompt_ids`; `loop.timing` says afterwards why it ended.

    Raises:
        InputError: the prompt fills the context.
    """
    check_prompt_length(prompt_ids, loop.context_tokens)
    stream = TextStream(tokenizer, stop)
    for token in loop.tokens(prompt_ids, max_new_tokens, sampling, eos):
        piece = stream.push(token)
        if piece:
            yield piece
        if stream.is_stopped:
            loop.timing.stop_reason = "stop"
            return
    rest = stream.finish()
    if rest:
        yield rest


def check_prompt_length(prompt_ids: Sequence[int], context_tokens: int) -> None:
    """Raise `InputError` unless there is room for an answer."""
    if len(prompt_ids) >= context_tokens:
        raise InputError(
            f"the prompt has {len(prompt_ids)} tokens but the context holds "
            f"{context_tokens}: shorten it or raise --ctx"
        )


def encode_prompt(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    """Token ids of text, or of chat messages in the tokenizer's chat template.

    Raises:
        InputError: nothing in it, or messages without a chat template.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    else:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("this model has no chat template: give plain text with --prompt")
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise InputError("the prompt is empty: give it at least one character")
    return ids


def chunks(
    token_ids: Sequence[int], chunk_tokens: int = PREFILL_CHUNK_TOKENS
) -> Iterator[Sequence[int]]:
    """The prompt in pieces of at most `chunk_tokens`."""
    for start in range(0, len(token_ids), chunk_tokens):
        yield token_ids[start : start + chunk_tokens]


def sample(logits: FloatArray, sampling: Sampling, generator: np.random.Generator) -> int:
    """Draw a token id from logits [V]; nucleus sampling when top_p < 1 (Holtzman et al. 2019)."""
    if sampling.temperature <= 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        ordered = probabilities[order]
        outside = ordered.cumsum() - ordered >= sampling.top_p  # the first is always inside
        probabilities[order[outside]] = 0
        probabilities /= probabilities.sum()
    return int(generator.choice(len(probabilities), p=probabilities))


class TextStream:
    """Tokens to text, piece by piece: never half a character, never text past a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._pending: list[int] = []
        self._context: list[int] = []
        self._held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Text that is certain after `token`."""
        self._pending.append(token)
        text = self._decode_pending()
        if text is None:
            return ""
        return self._release(self._held + text)

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        text = self._held
        if self._pending and not self.is_stopped:
            text += self._difference()
        self._held, self._pending = "", []
        return "" if self.is_stopped else text

    def _decode_pending(self) -> str | None:
        """New text, or None while it ends inside a character."""
        text = self._difference()
        if text.endswith("\ufffd") and len(self._pending) < 8:
            return None
        self._context = self._pending
        self._pending = []
        return text

    def _difference(self) -> str:
        """Text of the pending tokens, decoded after their predecessors: spaces depend on them."""
        decode = self._tokenizer.decode
        before: str = decode(self._context, skip_special_tokens=True)
        both: str = decode(self._context + self._pending, skip_special_tokens=True)
        return both[len(before) :]

    def _release(self, text: str) -> str:
        for stop in self._stop:
            position = text.find(stop)
            if position >= 0:
                self.is_stopped = True
                self._held = ""
                return text[:position]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
