"""The tokenizer of a checkpoint or package, as transformers reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_moe.config_reader import CONFIG_NAME
from edge_moe.errors import InputError
from edge_moe.runtime.model_config import load_config


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies beside the weights.

    Raises:
        InputError: there is none that transformers can read.
        SpecError: config.json is wrong, which transformers reads first.
    """
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        _without_cache(found)
        return found
    except Exception as error:  # the tokenizers library raises plain Exception
        if (folder / CONFIG_NAME).is_file():
            load_config(folder)
        raise InputError(
            f"{folder} holds no usable tokenizer ({_tokenizer_problem(folder, error)}): "
            "copy the model's tokenizer files there again"
        ) from None


def _without_cache(tokenizer: Any) -> None:
    """Remember no words: up to 3.4 MB, which tokenizers 0.23 keeps until the thread ends.

    Prompts are read as fast without.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    resize = getattr(model, "_resize_cache", None)
    if resize is not None:
        resize(0)


def _tokenizer_problem(folder: Path, error: Exception) -> str:
    """transformers' own text about missing files is long and names none of them."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return "neither tokenizer.json nor tokenizer.model is there"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
