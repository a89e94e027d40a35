"""Plans written by hand, and checkpoints rearranged by hand, for the tests of the builders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from edge_moe.budget import resident_expert_bytes
from edge_moe.checkpoint import Checkpoint
from edge_moe.formats import DROP, form_fits
from edge_moe.gguf_model import GgufModel
from edge_moe.plan import MemoryTerm, Plan, Target


def hand_plan(
    checkpoint: Checkpoint | GgufModel, forms: Sequence[Sequence[str]], target: Target = "native"
) -> Plan:
    """A plan with the given [L][E] forms, their true bytes, and made-up numbers elsewhere."""
    spec = checkpoint.spec
    widths = spec.expert_shape
    fitting = [form for row in forms for form in row if form_fits(form, *widths)]
    experts = sum(resident_expert_bytes(spec, form, target) for form in fitting)
    rows = [list(row) for row in forms]
    ones = [[1 / spec.num_experts] * spec.num_experts for _ in rows]
    return Plan(
        edge_moe_version="0.1.0",
        model=str(checkpoint.location),
        model_type=spec.model_type,
        model_fingerprint=checkpoint.fingerprint,
        stats_fingerprint="0" * 64,
        tasks=["code"],
        target=target,
        device="cpu",
        budget_bytes=10**9,
        context_tokens=256,
        moe_layer_ids=list(spec.moe_layer_ids),
        top_k=spec.top_k,
        forms=rows,
        tiers=[["none" if form == DROP else "device" for form in row] for row in rows],
        terms=[
            MemoryTerm(name="experts", num_bytes=experts, source="plan"),
            MemoryTerm(name="runtime", num_bytes=10**6, source="assumed"),
        ],
        loss=0.5,
        loss_unit="made up",
        frontier=[],
        rivals=[],
        saliency=ones,
        routed_share=ones,
        super_experts=[],
        limits=[],
    )


def random_forms(checkpoint: Checkpoint, choices: Sequence[str], seed: int = 0) -> list[list[str]]:
    """[L][E] drawn from `choices`; every form appears, and at least top_k experts stay.

    A router's groups lose the same places, so that they stay equal.
    """
    spec = checkpoint.spec
    generator = np.random.default_rng(seed)
    table = []
    for _ in spec.moe_layer_ids:
        row = [str(form) for form in generator.choice(choices, spec.num_experts)]
        row[: len(choices)] = choices
        generator.shuffle(row)
        keep = next(form for form in choices if form != DROP)
        for expert_id in range(spec.top_k):
            row[expert_id] = keep if row[expert_id] == DROP else row[expert_id]
        width = spec.num_experts // spec.router.num_groups
        for expert_id, form in enumerate(row[width:], width):
            if row[expert_id % width] == DROP:
                row[expert_id] = DROP
            elif form == DROP:
                row[expert_id] = keep
        table.append(row)
    return table


def uniform_forms(
    checkpoint: Checkpoint | GgufModel, num_kept: int, form: str = "bf16"
) -> list[list[str]]:
    """[L][E] with `num_kept` experts per layer, other ones in each, equally many per group."""
    spec = checkpoint.spec
    num_groups = spec.router.num_groups
    group_width = spec.num_experts // num_groups
    table = []
    for layer_id in spec.moe_layer_ids:
        generator = np.random.default_rng(layer_id)
        row = [DROP] * spec.num_experts
        for group in range(num_groups):
            members = generator.permutation(group_width)[: num_kept // num_groups]
            for member in members:
                row[group * group_width + int(member)] = form
        table.append(row)
    return table


def fused_copy(folder: Path, output: Path) -> Path:
    """The same checkpoint with the experts of each layer stacked into two tensors."""
    import torch

    shutil.copytree(folder, output)
    checkpoint = Checkpoint(folder)
    spec = checkpoint.spec
    tensors = load_file(folder / "model.safetensors")
    for layer_id in spec.moe_layer_ids:
        names = [spec.expert_tensor_names(layer_id, i) for i in range(spec.num_experts)]
        gate_up_name, down_name = spec.fused_tensor_names(layer_id)
        stacked = [torch.cat([tensors[gate], tensors[up]]) for gate, up, _ in names]
        tensors[gate_up_name] = torch.stack(stacked)
        tensors[down_name] = torch.stack([tensors[down] for _, _, down in names])
        for name in (name for triple in names for name in triple):
            del tensors[name]
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return output


def edit_config(folder: Path, **changes: object) -> None:
    """Change top-level keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by relative name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
