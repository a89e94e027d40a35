"""Made-up scores of a comparison."""

from __future__ import annotations

from edge_moe.compare.contenders import Kind
from edge_moe.compare.record import Score, TextScore
from edge_moe.metrics import Estimate


def fake_score(name: str, kind: Kind, kld: float, expert_bytes: int = 100) -> Score:
    """A method that loses `kld`; the rest follows from it."""
    text = TextScore(
        kld=Estimate(kld, 0.1), ppl=Estimate(2 + kld, 0.1), same_top=Estimate(1 - kld / 10, 0.1)
    )
    return Score(
        name=name,
        kind=kind,
        expert_bytes=expert_bytes,
        num_kept=4,
        forms={"q8_0": 4},
        in_task=text,
        off_task=text,
    )
