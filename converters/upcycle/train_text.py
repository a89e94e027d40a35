"""The text that a dense model is upcycled on."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edge_moe.converters.recover_text import TrainText, split_text
from edge_moe.converters.upcycle.dense_model import DenseModel
from edge_moe.runtime.heldout import spread
from edge_moe.runtime.tokenizer import load_tokenizer
from edge_moe.tasks import Tokenizer

_JUDGING_WINDOWS = 16
"""Of each text at most: they are read again at every judgement."""


def read_train_text(
    dense: DenseModel,
    tokenizer: Tokenizer,
    data: Sequence[str],
    window_tokens: int,
    max_windows: int | None,
) -> TrainText:
    """Windows of every text in `data`, as tasks are named and split; some of each judge.

    `tokenizer` is `dense_tokenizer`'s. `max_windows` is shared out among the texts. Memory: 4 bytes
    per token, and while one text is split about 40 per token of it.

    Raises:
        InputError: text that is unknown, unreadable or too short.
    """
    windows: list[array[int]] = []
    is_training: list[bool] = []
    share = None if max_windows is None else max(2, -(-max_windows // len(data)))
    for name in data:
        limit = dense.config.max_position_embeddings
        part = split_text([name], tokenizer, limit, window_tokens, share, "--seq")
        judging = spread(part.indices(False), _JUDGING_WINDOWS)
        kept = sorted([*part.indices(True), *judging])
        windows += [array("i", part.windows[index]) for index in kept]
        is_training += [part.is_training[index] for index in kept]
    return TrainText(windows, is_training)


def dense_tokenizer(dense: DenseModel) -> Any:
    """The tokenizer of a dense model.

    Raises:
        InputError: there is none that transformers can read.
    """
    if dense.location.is_dir():
        return load_tokenizer(dense.location)
    with TemporaryDirectory(prefix="edge-moe-tokenizer-") as folder:
        dense.copy_sidecar(Path(folder))
        return load_tokenizer(Path(folder))
