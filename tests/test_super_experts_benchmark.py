"""Which experts the benchmark zeroes, and that zeroing them is what it measures."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_checkpoint
from super_experts import FOUND, LOUDEST, ZeroPacker, choose, draw_others, zeroed_forms
from test_self_checks import PROMPT, runtime_logits, scale_down_proj

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.variants import PackedExperts, VariantScorer
from edge_moe.errors import InputError
from edge_moe.metrics import compare_tokens


def test_the_rule_first_then_the_loudest_of_its_layers() -> None:
    outputs = np.ones((4, 8))
    outputs[1, 5], outputs[3, 2] = 100, 90
    assert choose(outputs, 2) == (FOUND, ((1, 5),))
    outputs[3, 2] = 1000  # the last layer is not among the first 75 %
    outputs[0, 7] = 50
    assert choose(outputs, 2) == (LOUDEST, ((1, 5), (0, 7)))


def test_draws_are_others_of_the_same_layers() -> None:
    chosen = ((2, 1), (0, 3), (2, 0))
    draws = draw_others(chosen, 4, num_draws=20)
    for draw in draws:
        assert [row for row, _ in draw] == [0, 2, 2]
        assert not set(draw) & set(chosen)
        assert set(draw[1:]) == {(2, 2), (2, 3)}
    assert len({draw[0] for draw in draws}) == 3
    with pytest.raises(InputError, match="MoE layer 2 has too few other experts"):
        draw_others(chosen, 3, num_draws=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_zeroed_expert_adds_nothing_and_is_still_chosen(dtype: str, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "source", "qwen2_moe", dtype=dtype)
    checkpoint = Checkpoint(folder)
    forms = zeroed_forms(checkpoint, ((0, 3),))
    scorer = VariantScorer(
        checkpoint, [PROMPT], PackedExperts(checkpoint, ZeroPacker(checkpoint.spec))
    )
    found = scorer.score({"zeroed": forms})["zeroed"].kld
    zeroed = shutil.copytree(folder, tmp_path / "zeroed")
    scale_down_proj(zeroed, 3, 0.0)
    expected = compare_tokens(runtime_logits(zeroed), runtime_logits(folder), PROMPT).kld
    assert expected.mean() > 1e-4
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
