"""The tokenizer of a dense model, whatever it lies in."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edge_moe.converters.upcycle.dense_model import DenseModel
from edge_moe.runtime.tokenizer import load_tokenizer


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
