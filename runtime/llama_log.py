"""llama.cpp's log: kept from the terminal, and its errors kept for messages."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, Self

_LOG_ERROR = 4


class LlamaLog:
    """Use it in a `with` block around calls that may fail; `last` is the last error since then.

    The callback stays afterwards: llama.cpp's own would print to the terminal.
    """

    def __init__(self, llama: Any) -> None:
        """`llama` is the module llama_cpp.llama_cpp."""
        self._lines: list[str] = []
        self._llama = llama
        # ctypes keeps no reference: the library would call freed memory
        self._callback = llama.llama_log_callback(self._on_line)

    @property
    def last(self) -> str:
        return self._lines[-1] if self._lines else "no reason given"

    def _on_line(self, level: int, text: bytes, _data: object) -> None:
        if level == _LOG_ERROR and text.strip():
            self._lines.append(text.decode(errors="replace").strip())

    def __enter__(self) -> Self:
        self._lines.clear()
        self._llama.llama_log_set(self._callback, ctypes.c_void_p(0))
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to undo."""


@cache
def llama_log() -> LlamaLog:
    """The one of this process, which llama.cpp holds on to."""
    from llama_cpp import llama_cpp

    return LlamaLog(llama_cpp)
