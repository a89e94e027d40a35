"""Operation counts of the throughput benchmark, against what torch counts while a model runs."""

from __future__ import annotations

from dataclasses import replace
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
    assert work.m_smoe(1, 3) == 92 + 2 * (4 * 5 + 1 * 6 * 3 * 2**2)
    gradients = work.heapr(1) + 2 * 36
    assert work.calibration_with_gradients(1, 2) == gradients + work.calibration(1, 2)
    assert work.recover_routers(1) == 3 * 92 + 3 * 2 * 24


def test_naee_counts_the_sets_that_it_compares() -> None:
    """2 of 4 experts: 6 sets, or 2 * 2 where each of two groups keeps one; beyond 16, greedily."""
    work = Work(10, 2, 4, 1, hidden_size=3, expert_width=2, vocab_size=7)
    assert work.naee(1, 2) == 92 + 2 * (4 * 36 + 4 * 5 * 3 + 6 * 4)
    grouped = replace(work, num_groups=2)
    assert work.naee(1, 2) - grouped.naee(1, 2) == 2 * (6 - 4) * 4
    many = replace(work, num_experts=18)
    expected = 18 * 36 + 18 * 19 * 3 + (18 + 17) * 4  # 18 ways to lose the first, then 17
    assert many.naee(1, 16) == many.forward(1) + 2 * expected


def test_recovering_branches_by_hand() -> None:
    """One token that the original reads, 5 that are learned, 2 that judge; rank 2, 6 + 6 sides."""
    work = Work(10, 2, 4, 1, hidden_size=3, expert_width=2, vocab_size=7)
    work = replace(work, first_layer_weights=4, branch_sides=12)
    head, branches = 42, 2 * 2 * 12
    forward = 7 * (92 + head + branches)
    back = 5 * (92 - 2 * 4 + head + branches)
    assert work.recover_branches(1, 5, 2, rank=2) == 92 + head + forward + back
