"""Models of text and pictures around a language model that edge-moe shrinks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from edge_moe.families import COMPOSITES
from edge_moe.minimal_model import minimal_config

COMPOSITE_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": {
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 64,
        }
    },
    "gemma4": {},
}


def save_composite(
    folder: Path,
    family: str,
    tokenizer: Path,
    *,
    deviation: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A small model of `family` with the tokenizer in another folder; it is returned, too.

    Matrices are as transformers makes them, or random ones of that standard deviation.
    """
    inner = minimal_config(COMPOSITES[family])
    config = AutoConfig.for_model(family, text_config=inner, **COMPOSITE_CONFIGS[family])
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config).to(dtype)
    if deviation:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, deviation)
    model.save_pretrained(folder)
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)
    return model
