"""A folder that `build --target onnx` wrote: its names, and how to tell it from others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MODEL_NAME = "model.onnx"
HEAD_NAME = "model_head.onnx"
"""Logits of every position from `model.onnx`'s hidden states: to score a text, not to go on."""
STANDARD_NAME = "model_standard.onnx"
"""The same decoder in standard operations, where it was asked for."""


@dataclass(frozen=True)
class OnnxOptions:
    """What `build` may be told about an ONNX graph."""

    is_exact: bool = False
    """4-bit experts multiply with float32 activations. Otherwise these are rounded to 8 bits too,
    as llama.cpp does: on a CPU two to six times faster, and 2 to 3 % off in random models."""
    with_standard: bool = False
    """Write `STANDARD_NAME` as well."""


def is_onnx_folder(folder: Path) -> bool:
    """Whether `folder` holds a decoder for onnxruntime."""
    return (folder / MODEL_NAME).is_file()
