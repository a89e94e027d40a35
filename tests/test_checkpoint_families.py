"""Every supported family opens, and its experts are the ones transformers holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import FAMILY_NAMES, TinyCheckpoint

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
