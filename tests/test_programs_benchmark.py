"""`benchmarks/programs.py`: all programs minimise the same costs within the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import TinyCheckpoint
from fake_stats import fake_stats
from programs import JOINT, Found, show, solutions
from rich.console import Console

from edge_moe.candidates import candidate_forms
from edge_moe.checkpoint import Checkpoint
from edge_moe.metrics import Estimate
from edge_moe.planner import gather_evidence


def test_more_freedom_costs_no_more(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe", wide=True))
    spec, stats = checkpoint.spec, fake_stats(checkpoint)
    generator = np.random.default_rng(1)
    for total in stats.expert_sums.values():
        total.add(generator.random(stats.routed_tokens.shape))
    forms = candidate_forms(spec, "native")
    whole_bytes = 2 * spec.num_moe_layers * spec.num_experts * spec.expert_weights
    problem = gather_evidence(spec, stats, forms, "native", int(0.16 * whole_bytes)).problem
    found = solutions(problem, forms)
    assert list(found) == [JOINT, "GEMQ", "MC-MoE"]
    costs = [each.loss for each in found.values()]
    assert costs[0] <= costs[1] * (1 + 1e-5) and costs[1] <= costs[2] * (1 + 1e-5)
    for each in found.values():
        assert each.expert_bytes <= problem.budget_bytes
        assert each.loss == pytest.approx(problem.loss_of(each.choice))


def test_what_does_not_fit_is_left_out(
    tiny_checkpoint: TinyCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe", wide=True))
    forms = candidate_forms(checkpoint.spec, "native")
    problem = gather_evidence(
        checkpoint.spec, fake_stats(checkpoint), forms, "native", 400_000
    ).problem
    assert list(solutions(problem, forms)) == [JOINT]
    assert "MC-MoE: " in capsys.readouterr().err


def test_the_table_compares_with_the_joint_program() -> None:
    rows = [
        Found(
            task="code",
            share=0.125,
            program=name,
            cost=cost,
            expert_bytes=num_bytes,
            kld=Estimate(kld, 0.001),
        )
        for name, cost, num_bytes, kld in ((JOINT, 2.0, 100, 0.01), ("GEMQ", 3.0, 90, 0.014))
    ]
    console = Console(width=140, record=True)
    show(rows, console)
    row = next(line for line in console.export_text().splitlines() if "GEMQ" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["code", "12.5%", "GEMQ", "90.0%", "3", "1.50", "0.0140 ± 0.0010", "1.40"]
