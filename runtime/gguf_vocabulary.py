"""Text to tokens and back, by llama.cpp's own tokenizer of a loaded model."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from edge_moe.errors import InputError
from edge_moe.gguf_header import GgufHeader

_NO_VOCABULARY = 0
_MOST_SPECIAL_TOKENS = 16
"""Around a text; within it no token is shorter than a byte."""


class GgufVocabulary:
    """What `generate_text` and the commands need of a tokenizer."""

    def __init__(self, llama: Any, model: Any, header: GgufHeader) -> None:
        """`llama` is the module llama_cpp.llama_cpp, `model` a pointer of it."""
        self._llama = llama
        self._vocabulary = llama.llama_model_get_vocab(model)
        template = header.metadata.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) else None
        end: int = llama.llama_vocab_eos(self._vocabulary)
        self.eos_token_id = end if end >= 0 else None

    @property
    def end_ids(self) -> set[int]:
        """Tokens after which a text or a turn is over."""
        count = self._llama.llama_vocab_n_tokens(self._vocabulary)
        return {each for each in range(count) if self._is_end(each)}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; the file's metadata decides which special tokens are added.

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

    def prompt_ids(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids of text, or of chat messages in the file's chat template.

        Raises:
            InputError: nothing in it, or messages without a chat template.
        """
        if isinstance(prompt, str):
            ids = self.encode(prompt)
        else:
            ids = self.encode(self._rendered(prompt), add_special_tokens=False)
        if not ids:
            raise InputError("the prompt is empty: give it at least one character")
        return ids

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        """`messages` in the file's own template, in jinja2's sandbox."""
        if self.chat_template is None:
            raise InputError("this model has no chat template: give plain text with --raw")
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        llama = self._llama
        eos, bos = (
            self._piece(token, True).decode(errors="replace") if token >= 0 else ""
            for token in (
                llama.llama_vocab_eos(self._vocabulary),
                llama.llama_vocab_bos(self._vocabulary),
            )
        )
        render: Any = Jinja2ChatFormatter(self.chat_template, eos, bos)
        return str(render(messages=messages).prompt)

    def _is_end(self, token: int) -> bool:
        return bool(self._llama.llama_vocab_is_eog(self._vocabulary, token))

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
