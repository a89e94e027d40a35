"""Logits and greedy text of a GGUF file, through llama-cpp-python (extra `gguf`).

The KV cache is kept in float32 and flash attention is off, so that the logits differ from those of
transformers by the weights' form and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from edge_moe.errors import CheckpointError, InputError, MissingExtraError
from edge_moe.gguf_header import GgufHeader
from edge_moe.gguf_split import read_parts
from edge_moe.measurement import usable_cores
from edge_moe.runtime.gguf_tokenizer import GgufTokenizer
from edge_moe.runtime.llama_api import calm_threads
from edge_moe.runtime.llama_log import llama_log
from edge_moe.runtime.llama_probe import require_loadable

_GGML_TYPE_F32 = 0
_LONGEST_CONTEXT_TOKENS = 2**27
_VOCABULARY_CONTEXT_TOKENS = 8  # llama-cpp-python makes a context even for a vocabulary alone


def _tokenizer(llama: Any) -> GgufTokenizer:
    """Of a `llama_cpp.Llama`."""
    from llama_cpp import llama_cpp

    template = llama.metadata.get("tokenizer.chat_template")
    return GgufTokenizer(llama_cpp, llama._model.vocab, template)


@contextmanager
def gguf_tokenizer(path: Path) -> Iterator[GgufTokenizer]:
    """The tokenizer of `path`, without its weights.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        CheckpointError: a damaged header, or a part of the model that is missing.
        InputError: llama.cpp does not understand the vocabulary.
    """
    _check_context(read_parts(path)[0])
    llama = _load(path, _VOCABULARY_CONTEXT_TOKENS, vocab_only=True)
    try:
        yield _tokenizer(llama)
    finally:
        llama.close()


def open_untrusted(path: Path, context_tokens: int) -> GgufModel:
    """A file from anywhere: its header is checked, and llama.cpp asked in a process of its own.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        CheckpointError: a damaged header, or a part of the model that is missing.
        InputError: llama.cpp cannot load the file, or would abort.
    """
    _import_llama(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the path of a GGUF file")
    _check_context(read_parts(path)[0])
    require_loadable(path, context_tokens, context_tokens, {})
    return GgufModel(path, context_tokens)


def _check_context(header: GgufHeader) -> None:
    """No model has such a context, and llama-cpp-python allocates by it."""
    found = header.number("context_length") or 0
    if not 0 <= found <= _LONGEST_CONTEXT_TOKENS:
        raise CheckpointError(
            f"{header.path}: {header.architecture}.context_length is {found}, at most "
            f"{_LONGEST_CONTEXT_TOKENS} are believed: the file is damaged, download it again"
        )


class GgufModel:
    """One GGUF file, opened for evaluation: the interface of `runtime.session.Session` it needs."""

    def __init__(self, path: Path, context_tokens: int) -> None:
        """Load `path` with room for `context_tokens`; memory: the file and T x V float32 logits.

        llama.cpp ends the process for some damaged files: see `open_untrusted`.

        Raises:
            MissingExtraError: llama-cpp-python is not installed.
            InputError: llama.cpp cannot load the file.
        """
        self._path = path
        self._context_tokens = context_tokens
        self._llama = _load(path, context_tokens)
        self.tokenizer = _tokenizer(self._llama)

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """[T, V] float32: row t follows `token_ids[: t + 1]`.

        Raises:
            InputError: more tokens than the context holds, or llama.cpp fails at them.
        """
        if len(token_ids) > self._context_tokens:
            raise InputError(
                f"{self._path}: {len(token_ids)} tokens do not fit a context of "
                f"{self._context_tokens}: use smaller windows"
            )
        self._llama.reset()
        try:
            self._llama.eval(list(token_ids))
        except RuntimeError as error:  # llama_decode's code
            raise InputError(
                f"{self._path}: llama.cpp cannot compute it ({error}): free some memory, or use "
                "smaller windows"
            ) from None
        return np.array(self._llama.scores[: len(token_ids)], dtype=np.float32)

    def generate(
        self, prompt: str, *, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """Pieces of the greedy continuation of `prompt`."""
        self._llama.reset()
        pieces = self._llama.create_completion(
            self.tokenizer.encode(prompt),
            max_tokens=max_new_tokens,
            temperature=0.0,
            repeat_penalty=1.0,
            stop=list(stop),
            stream=True,
        )
        for piece in pieces:
            yield piece["choices"][0]["text"]

    def close(self) -> None:
        self._llama.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _import_llama(path: Path) -> Any:
    calm_threads()
    try:
        from llama_cpp import Llama
    except ImportError:
        raise MissingExtraError("llama-cpp-python", "gguf", f"evaluating {path}") from None
    return Llama


def _load(path: Path, context_tokens: int, vocab_only: bool = False) -> Any:
    llama = _import_llama(path)
    try:
        with llama_log():
            return llama(
                str(path),
                n_ctx=context_tokens,
                n_batch=context_tokens,
                n_threads=usable_cores(),
                vocab_only=vocab_only,
                logits_all=not vocab_only,
                flash_attn=False,
                type_k=_GGML_TYPE_F32,
                type_v=_GGML_TYPE_F32,
                verbose=False,
            )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: llama.cpp cannot load it ({error}): free some memory, or export it again"
        ) from None
