"""Text to tokens and back, by llama.cpp's own tokenizer of a loaded model."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from edge_moe.errors import InputError

_NO_VOCABULARY = 0
_MOST_SPECIAL_TOKENS = 16
"""Around a text; within it no token is shorter than a byte."""


class GgufTokenizer:
    """The part of a transformers tokenizer's interface that edge-moe uses."""

    def __init__(self, llama: Any, vocabulary: Any, chat_template: object) -> None:
        """`llama` is the module llama_cpp.llama_cpp, `vocabulary` a pointer of it."""
        self._llama = llama
        self._vocabulary = vocabulary
        self.chat_template = chat_template if isinstance(chat_template, str) else None
        end: int = llama.llama_vocab_eos(vocabulary)
        self.eos_token_id = end if end >= 0 else None

    @cached_property
    def end_ids(self) -> set[int]:
        """Tokens after which a text or a turn is over."""
        is_end = self._llama.llama_vocab_is_eog
        count = self._llama.llama_vocab_n_tokens(self._vocabulary)
        return {each for each in range(count) if is_end(self._vocabulary, each)}

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """`input_ids` of `text`."""
        return {"input_ids": self.encode(text, add_special_tokens=add_special_tokens)}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; the file's metadata decides which special tokens are added.

        `Llama.tokenize` would take as much memory as the file's context_length asks for.

        Raises:
            InputError: the file has no vocabulary.
        """
        if self._llama.llama_vocab_type(self._vocabulary) == _NO_VOCABULARY:
            raise InputError("the file has no vocabulary, so it reads no text: export it again")
        raw = text.encode()
        room = len(raw) + _MOST_SPECIAL_TOKENS
        ids = (self._llama.llama_token * room)()
        count = self._llama.llama_tokenize(
            self._vocabulary, raw, len(raw), ids, room, add_special_tokens, True
        )
        if count < 0:
            raise InputError(f"llama.cpp gives {-count} tokens for {len(raw)} bytes of text")
        return list(ids[:count])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens; bytes that are no characters yet become U+FFFD."""
        pieces = [self._piece(each, not skip_special_tokens) for each in token_ids]
        return b"".join(pieces).decode(errors="replace")

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool = False
    ) -> str:
        """`conversation` as the file's own template renders it, in jinja2's sandbox."""
        if tokenize or self.chat_template is None:
            raise ValueError("chat messages are rendered as text, by the file's own template")
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        llama = self._llama
        eos, bos = (
            self.decode([token], skip_special_tokens=False) if token >= 0 else ""
            for token in (
                llama.llama_vocab_eos(self._vocabulary),
                llama.llama_vocab_bos(self._vocabulary),
            )
        )
        render: Any = Jinja2ChatFormatter(
            self.chat_template, eos, bos, add_generation_prompt=add_generation_prompt
        )
        return str(render(messages=conversation).prompt)

    def _piece(self, token: int, with_special: bool) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = self._llama.llama_token_to_piece(
                self._vocabulary, token, buffer, room, 0, with_special
            )
            if count >= 0:
                return buffer.raw[:count]
            room = -count
