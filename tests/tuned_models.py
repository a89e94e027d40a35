"""Checkpoints that differ from another in ways known to the tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Change = Callable[[str, torch.Tensor, torch.Generator], torch.Tensor]
"""(name, values in float32, source of chance) -> what is added."""


def tuned_copy(base: Path, output: Path, change: Change) -> Path:
    """`base` with `change` added to every tensor, in the dtype that it has."""
    shutil.copytree(base, output)
    generator = torch.Generator().manual_seed(7)
    tensors = load_file(base / "model.safetensors")
    for name in sorted(tensors):
        value = tensors[name].float()
        added = value + change(name, value, generator)
        tensors[name] = added.to(tensors[name].dtype).contiguous()
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return output


def noise(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A small change everywhere."""
    return 0.02 * torch.randn(value.shape, generator=generator)
