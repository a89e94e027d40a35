"""Operation counts of the throughput benchmark, against what torch counts while a model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import FAMILY_NAMES, TinyCheckpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from work_bounds import Work

from edge_moe.checkpoint import Checkpoint

NUM_TOKENS = 24


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_forward_pass_is_what_torch_counts(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    """All but attention's scores, which the counter sees as fewer operations than a weight has."""
    folder = tiny_checkpoint(family)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager"
    )
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.base_model(torch.arange(3, 3 + NUM_TOKENS)[None], use_cache=False)
    spec = Checkpoint(folder).spec
    found = Work.of(Checkpoint(folder)).forward(NUM_TOKENS)
    scores = 2 * NUM_TOKENS**2 * spec.num_layers * 2 * spec.num_attention_heads * 64
    assert found <= counter.get_total_flops() <= found + scores


def test_the_rest_by_hand() -> None:
    """H = 3, I = 2, E = 4, k = 1, two layers, 10 dense weights, 7 words; one token."""
    work = Work(10, 2, 4, 1, hidden_size=3, expert_width=2, vocab_size=7)
    assert work.forward(1) == 20 + 2 * 36
    assert work.statistics(1) == 92 + 2 * (36 + 24)
    assert work.hessians(1) == 2 * (24 + 2 * 13)
    assert work.hessians(1, every_token=True) == 4 * work.hessians(1)
    assert work.form_losses(1, 2) == 2 * 3 * 36
    assert work.gptq(3) == pytest.approx(8 * (2 / 3 * 35 + 3 * (36 + 12)))
    assert work.heapr(1) == 3 * 92 + 4 * 21 + 2 * 36
    assert work.dern(3) == 2 * (1 * 2 * 3 * 2) * 12
    assert work.sub_moe(1) == 92 + 2 * (4 * 36 + 16 * 6)
