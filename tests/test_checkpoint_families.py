"""Every supported family opens, and its experts are the ones transformers holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FAMILY_NAMES, TinyCheckpoint
from hand_plan import hand_plan, uniform_forms

from edge_moe.checkpoint import Checkpoint


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_experts_equal_those_of_transformers(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint(family)
    checkpoint = Checkpoint(folder)
    spec = checkpoint.spec
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layer_id = spec.moe_layer_ids[-1]
    experts: Any = model.get_submodule(spec.moe_module(layer_id)).experts
    for expert_id in (0, spec.num_experts - 1):
        gate, up, down = checkpoint.expert(layer_id, expert_id)
        stacked = experts.gate_up_proj[expert_id].detach().numpy()
        np.testing.assert_array_equal(np.concatenate([gate, up]), stacked)
        np.testing.assert_array_equal(down, experts.down_proj[expert_id].detach().numpy())
    dense = {spec.module_name(info.name) for info in checkpoint.dense_tensors}
    held = {name for name in model.state_dict() if ".experts." not in name}
    assert dense == held


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_module_names_with_stacked_experts(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """`save_pretrained(save_original_format=False)` writes transformers' own names."""
    import torch
    from transformers import AutoModelForCausalLM

    from edge_moe.converters.build import build
    from edge_moe.runtime.session import Session

    original = Checkpoint(tiny_checkpoint(family))
    model: Any = AutoModelForCausalLM.from_pretrained(original.folder, dtype=torch.bfloat16)
    fused = tmp_path / "fused"
    model.save_pretrained(fused, save_original_format=False)
    for path in original.folder.glob("tokenizer*"):
        (fused / path.name).write_bytes(path.read_bytes())
    checkpoint = Checkpoint(fused)
    assert checkpoint.is_fused and not original.is_fused
    shapes = [
        {each.spec.module_name(info.name): info.shape for info in each.dense_tensors}
        for each in (original, checkpoint)
    ]
    assert shapes[0] == shapes[1]
    layer_id = checkpoint.spec.moe_layer_ids[-1]
    for ours, theirs in zip(
        checkpoint.expert(layer_id, 3), original.expert(layer_id, 3), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    answers: list[list[int]] = []
    for each in (original, checkpoint):
        plan = hand_plan(each, uniform_forms(each, 4))
        package = build(plan, tmp_path / f"out-{len(answers)}", model=each.folder)
        with Session.open(package, context_tokens=64) as session:
            answers.append(session.generate_ids([3, 4, 5], 8))
    assert answers[0] == answers[1]
    hf = build(hand_plan(checkpoint, uniform_forms(checkpoint, 4)), tmp_path / "hf", target="hf")
    loaded: Any = AutoModelForCausalLM.from_pretrained(hf, output_loading_info=True)
    assert not any(loaded[1][key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
