"""Float32 GGUF files of tiny Hugging Face checkpoints, with every expert."""

from __future__ import annotations

from pathlib import Path

from gguf_files import requantised
from hand_plan import hand_plan

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.export_gguf import export_gguf
from edge_moe.converters.gguf_families import GGUF_FAMILIES
from edge_moe.families import FAMILIES

CALIBRATED = tuple(sorted(GGUF_FAMILIES))
"""Families that llama.cpp itself calibrates."""
ARCHITECTURES = {name: str(FAMILIES[name].gguf_arch) for name in CALIBRATED}


def float32_gguf(
    folder: Path, output: Path, *, merged: bool = False, split_max_tensors: int = 0
) -> Path:
    """Write the checkpoint `folder` to the file `output`, everything in float32.

    `merged` stores gate_proj and up_proj in one tensor. A split file is written beside `output`,
    and its first part returned.
    """
    checkpoint = Checkpoint(folder)
    forms = [["f32"] * checkpoint.spec.num_experts for _ in checkpoint.spec.moe_layer_ids]
    plan = hand_plan(checkpoint, forms, "gguf")
    if not merged and not split_max_tensors:
        return export_gguf(plan, checkpoint, output)
    whole = export_gguf(plan, checkpoint, output.with_suffix(".whole"))
    return requantised(whole, output, {}, merged=merged, split_max_tensors=split_max_tensors)
