"""Tokenizers of sessions that are gone leave nothing in the process."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from edge_moe.runtime.tokenizer import load_tokenizer
from edge_moe.tasks import load_task_texts


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks").split()
        + ["keepcost"]
    ]


def _used_bytes() -> int:
    """What malloc has given out."""
    try:
        mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        pytest.skip("no glibc from 2.33 on, which counts what it has given out")
    mallinfo.restype = _Mallinfo
    return int(mallinfo().uordblks)


def test_words_of_prompts_are_not_kept(demo_model: Path) -> None:
    text = "\n".join(load_task_texts("code", "heldout"))[:60_000]
    used = []
    for _ in range(6):
        tokenizer = load_tokenizer(demo_model)
        assert len(tokenizer.encode(text)) > 1000
        del tokenizer
        used.append(_used_bytes())
    assert used[-1] - used[1] < 2**19, "the library's cache of words would take 1 MB of each"
