"""The model that a path holds, as a source of plans: a Hugging Face folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from edge_moe.checkpoint import Checkpoint
from edge_moe.gguf_model import GgufModel
from edge_moe.gguf_split import is_gguf_name


def open_model(path: Path) -> Checkpoint | GgufModel:
    """Open `path`, reading headers only.

    Raises:
        SpecError: an architecture that is not supported, or values that lie.
        CheckpointError: missing, truncated or damaged.
    """
    return GgufModel(path) if is_gguf_file(path) else Checkpoint(path)


def is_gguf_file(path: Path) -> bool:
    """Whether `path` is a file that ends in .gguf."""
    return is_gguf_name(path) and path.is_file()
