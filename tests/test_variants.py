"""Plans scored layer by layer agree with packages that were really built and run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import FAMILY_NAMES, TinyCheckpoint
from hand_plan import hand_plan, random_forms

from edge_moe import metrics
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.variants import PackedExperts, VariantScorer
from edge_moe.runtime.session import Session

WINDOWS = [list(range(3, 35)), list(range(40, 72)), list(range(5, 25))]


def group_forms(checkpoint: Checkpoint, seed: int) -> list[list[str]]:
    """Random forms in which every routing group keeps two experts."""
    groups = checkpoint.spec.router.num_groups
    size = checkpoint.spec.num_experts // groups
    generator = np.random.default_rng(seed)
    rows = []
    for _ in checkpoint.spec.moe_layer_ids:
        kept = [["q8_0", "q4_0", *["drop"] * (size - 2)] for _ in range(groups)]
        rows.append([str(form) for group in kept for form in generator.permutation(group)])
    return rows


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_scores_are_those_of_built_packages(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(family))
    make = group_forms if checkpoint.spec.router.num_groups > 1 else None
    draws = [
        make(checkpoint, seed) if make else random_forms(checkpoint, ("drop", "q8_0", "q4_0"), seed)
        for seed in range(2)
    ]
    variants = {
        "first": draws[0],
        "mixed": [draws[0][0], *draws[1][1:]],
        "whole": [["bf16"] * checkpoint.spec.num_experts] * checkpoint.spec.num_moe_layers,
    }
    shares: list[float] = []
    scores = VariantScorer(checkpoint, WINDOWS).score(variants, shares.append)
    assert shares[-1] == 1.0
    assert scores["whole"].kld.max() == 0.0
    with Session.open(checkpoint.folder, context_tokens=64) as session:
        base = [session.logits(window) for window in WINDOWS]
    for name in ("first", "mixed"):
        output = build(hand_plan(checkpoint, variants[name]), tmp_path / name)
        with Session.open(output, context_tokens=64, kernels="exact") as session:
            parts = [
                metrics.compare_tokens(session.logits(window), reference, window)
                for window, reference in zip(WINDOWS, base, strict=True)
            ]
        built = metrics.TokenScores.join(parts)
        np.testing.assert_allclose(np.sort(scores[name].kld), np.sort(built.kld), atol=2e-5)
        np.testing.assert_allclose(scores[name].kld.mean(), built.kld.mean(), rtol=1e-3)
    assert scores["first"].kld.mean() != scores["mixed"].kld.mean()


def test_scores_follow_the_order_of_the_windows(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("olmoe"))
    variants = {"q4": random_forms(checkpoint, ("drop", "q4_0"))}
    together = VariantScorer(checkpoint, WINDOWS).score(variants)["q4"]
    apart = [VariantScorer(checkpoint, [window]).score(variants)["q4"] for window in WINDOWS]
    joined = metrics.TokenScores.join(apart)
    np.testing.assert_allclose(together.kld, joined.kld, atol=1e-6)


def test_packed_experts_stay_within_their_bytes(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("olmoe"))
    small, large = PackedExperts(checkpoint, limit_bytes=1), PackedExperts(checkpoint)
    for expert_id in (0, 1, 0):
        for left, right in zip(
            small.unpacked(1, expert_id, "q4_0"), large.unpacked(1, expert_id, "q4_0"), strict=True
        ):
            np.testing.assert_array_equal(left, right)
    assert len(small._records) == 1
    assert len(large._records) == 2
