"""Every sum and every criterion of a MoE small enough to be worked out by hand, as it really runs.

One layer of four experts of width 1, top-2, hidden size 4, without attention. The hidden states of
the three tokens and the outputs of the experts all lie along the rows r0..r3 of a Hadamard matrix:
orthogonal, of length 2 and entries of +-1. An RMS norm leaves such a token as it is, and a row of
weights sum_t c_t r_t / 4 gives c_t on token t: routers and experts can be told what to give.

                     A (r0)              B (r1)              C (r2)
    p              .66 .22 .08 .04    .18 .06 .72 .04    .18 .72 .06 .04     softmax over experts
    g              .75 .25            .2      .8         .2  .8              the two largest p / sum
    f0             4 r3               20 r3              10 r3
    f1             12 r0                                 2.5 r0
    f2                                2.5 r1
    m = sum g f    3 r3 + 3 r0        4 r3 + 2 r1        2 r3 + 2 r0
    h + m          4 r0 + 3 r3        3 r1 + 4 r3        r2 + 2 r3 + 2 r0
    cos(h, h + m)  4/5                3/5                1/3
"""

from __future__ import annotations

from math import log
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_moe.converters.calibrate import calibrate
from edge_moe.saliency import CRITERIA, saliency
from edge_moe.stats import EXPERT_SUMS, LAYER_SUMS, ExpertStats

ROWS = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).float()
TOKENS = "ABC"
SCORES = torch.tensor(
    [[0.66, 0.22, 0.08, 0.04], [0.18, 0.06, 0.72, 0.04], [0.18, 0.72, 0.06, 0.04]]
)
LOGIT_OFFSETS = torch.tensor([[log(100)], [0.0], [0.0]])
"""Added to all logits of a token: the scores stay, and A's largest raw logit is above 0."""
LENGTHS = torch.tensor([[4, 12, 0, 0], [20, 0, 2.5, 0], [10, 2.5, 0, 0]])
"""[token, expert] f as a multiple of the expert's own row."""
OUTPUT_ROWS = (3, 0, 1, 2)
"""The r that each expert's output lies along."""
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 4,
    "head_dim": 4,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "moe_intermediate_size": 1,
    "rms_norm_eps": 1e-12,
}
OPEN_GATE = 20.0
"""silu(20) is 20 to 9 digits."""

# Expert 0 sees A, B, C with |f| 8, 40, 20; expert 1 A and C with 24, 5; expert 2 B with 5.
# s = 1 - cos: 1/5, 2/5, 2/3.
SUMS: dict[str, list[float]] = {
    "gate": [0.75 + 0.2 + 0.2, 0.25 + 0.8, 0.8, 0],
    "output_norm": [8 + 40 + 20, 24 + 5, 5, 0],
    "output_square": [64 + 1600 + 400, 576 + 25, 25, 0],
    "gated_norm": [6 + 8 + 4, 6 + 4, 4, 0],  # g |f|: .75 8, .2 40, .2 20; .25 24, .8 5; .8 5
    "gated_output_square": [48 + 320 + 80, 144 + 20, 20, 0],
    "gated_square": [36 + 64 + 16, 36 + 16, 16, 0],
    "shifted_norm": [6 / 5 + 8 * 2 / 5 + 4 * 2 / 3, 6 / 5 + 4 * 2 / 3, 4 * 2 / 5, 0],
    "router_score": [0.66 + 0.18 + 0.18, 0.22 + 0.72, 0.72, 0],
    "top_score": [0.66, 0.72, 0.72, 0],  # A's heaviest is expert 0, B's 2, C's 1
    "top_logit": [log(66), log(0.72), log(0.72), 0],
}
LAYER: dict[str, float] = {
    "moe_square": 4 * ((9 + 9) + (16 + 4) + (4 + 4)),
    "residual_square": 4 * ((16 + 9) + (9 + 16) + (1 + 4 + 4)),
}
BY_HAND: dict[str, list[float]] = {
    "frequency": [3, 2, 1, 0],
    "weighted-frequency": [1.15, 1.05, 0.8, 0],
    "ean": [68, 29, 5, 0],
    "reap": [18 / 3, 10 / 2, 4 / 1, 0],
    "man": [68 / 3, 29 / 2, 5 / 1, 0],
    "msan": [2064 / 3, 601 / 2, 25 / 1, 0],
    "easy-ep": [106 / 15, 58 / 15, 1.6, 0],
    "tcess-released": [log(66) / 3, log(0.72) / 3, log(0.72) / 3, 0],
    "tcess": [0.22, 0.24, 0.24, 0],
    "pmq": [1 * 0.34**1.5, 2 / 3 * (0.94 / 3) ** 1.5, 1 / 3 * 0.24**1.5, 0],
}


def along_tokens(columns: Tensor) -> Tensor:
    """[3, n] what to give on A, B, C -> [n, 4] weights that do."""
    return columns.T @ ROWS[: len(TOKENS)] / 4


def write_weights(model: Any, token_ids: list[int]) -> None:
    layer = model.model.layers[0]
    experts = layer.mlp.experts
    with torch.no_grad():
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.fill_(1.0)
        layer.self_attn.o_proj.weight.zero_()
        model.model.embed_tokens.weight[token_ids] = ROWS[: len(TOKENS)]
        layer.mlp.gate.weight.copy_(along_tokens(SCORES.log() + LOGIT_OFFSETS))
        gates = along_tokens(torch.full((len(TOKENS), 4), OPEN_GATE))
        ups = along_tokens(LENGTHS / OPEN_GATE)
        experts.gate_up_proj.copy_(torch.stack([gates, ups], dim=1))
        experts.down_proj.copy_(ROWS[list(OUTPUT_ROWS)][:, :, None])


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> ExpertStats:
    """What `calibrate` measures on the text ABC."""
    folder = tmp_path_factory.mktemp("by-hand")
    model = make_tiny_checkpoint(folder / "model", "qwen3_moe", dtype="float32", **CONFIG)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    write_weights(network, AutoTokenizer.from_pretrained(model).encode(TOKENS))
    network.save_pretrained(model)
    (folder / "task.txt").write_text(f"{TOKENS} {TOKENS}")  # the second half is held out
    return calibrate(model, [str(folder / "task.txt")], folder / "stats", forms=())


def test_nothing_is_left_out() -> None:
    assert SUMS.keys() == set(EXPERT_SUMS)
    assert LAYER.keys() == set(LAYER_SUMS)
    assert {*BY_HAND, "random"} == set(CRITERIA)


def test_counts(stats: ExpertStats) -> None:
    assert stats.info.num_tokens == 3
    assert stats.routed_tokens.tolist() == [[3, 2, 1, 0]]
    np.testing.assert_allclose(stats.max_output, [[20, 12, 2.5, 0]], rtol=1e-6)


@pytest.mark.parametrize("name", EXPERT_SUMS)
def test_sums_of_experts(name: str, stats: ExpertStats) -> None:
    found = stats.expert_sums[name].values()
    np.testing.assert_allclose(found, [SUMS[name]], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", LAYER_SUMS)
def test_sums_of_the_layer(name: str, stats: ExpertStats) -> None:
    np.testing.assert_allclose(stats.layer_sums[name].values(), [LAYER[name]], rtol=1e-6)


@pytest.mark.parametrize("name", BY_HAND)
def test_criteria(name: str, stats: ExpertStats) -> None:
    np.testing.assert_allclose(saliency(stats, name), [BY_HAND[name]], rtol=1e-6, atol=1e-12)
