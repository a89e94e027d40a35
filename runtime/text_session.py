"""`TextSession`: what every session does alike once it has a tokenizer and a loop of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from edge_moe.plan import Device, MemoryTerm
from edge_moe.runtime.generate import (
    Sampling,
    Timing,
    TokenLoop,
    encode_prompt,
    generate_text,
)

Prompt = str | list[dict[str, str]]
"""Text, or messages of a chat."""


@dataclass(frozen=True)
class Where:
    """The device, as `torch.device` names it."""

    type: Device


class TextSession(ABC):
    """A model that can be asked. Close it, or use it in a `with` block."""

    tokenizer: Any
    timing: Timing
    """Of the last generation."""

    @property
    @abstractmethod
    def eos_ids(self) -> set[int]:
        """Tokens that end a text."""

    @abstractmethod
    def new_loop(self) -> TokenLoop:
        """A new sequence."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""

    def host_memory(self) -> list[MemoryTerm]:
        """What is kept in RAM beside a device that has the model; no part of the budget."""
        return []

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Text that follows `prompt` (a string, or chat messages for the chat template).

        `timing` says afterwards how long it took and why it stopped. Closing the iterator, or
        Ctrl-C while it runs, leaves the session usable. With one seed, sessions draw the same
        tokens from equal logits.

        Raises:
            InputError: an empty prompt, one longer than the context, or chat without a template.
        """
        prompt_ids = self.prompt_ids(prompt)
        loop = self._loop_for(prompt, prompt_ids)
        self.timing = loop.timing
        sampling = Sampling(temperature, top_p, seed)
        yield from generate_text(
            loop, self.tokenizer, prompt_ids, self.eos_ids, sampling, max_new_tokens, stop
        )

    def generate_ids(
        self, prompt_ids: Sequence[int], max_new_tokens: int, *, stop_at_eos: bool = True
    ) -> list[int]:
        """Greedy continuation as token ids."""
        loop = self.new_loop()
        self.timing = loop.timing
        eos = self.eos_ids if stop_at_eos else set()
        return list(loop.tokens(prompt_ids, max_new_tokens, Sampling(), eos))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            InputError: nothing in it, or messages without a chat template.
        """
        return encode_prompt(self.tokenizer, prompt)

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def _loop_for(self, prompt: Prompt, prompt_ids: Sequence[int]) -> TokenLoop:
        """The sequence that a prompt starts, or goes on."""
        return self.new_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
