"""Measuring plans takes less memory than `plan` states, and is refused where that is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import make_tiny_checkpoint
from peak_memory import measure_peak, needs_proc

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters import calibration_memory
from edge_moe.converters.calibrate import calibrate
from edge_moe.converters.search_memory import search_terms
from edge_moe.errors import BudgetError

IMPORTS = """
import sys
from pathlib import Path
import numpy as np
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.plan_measure import PlanMeasure
from edge_moe.stats import ExpertStats
from edge_moe.trials import MAX_PASS_PROPOSALS
"""
MEASURED = """
model, task, stats = sys.argv[1:]
checkpoint, info = Checkpoint(Path(model)), ExpertStats.load(Path(stats)).info
measure = PlanMeasure(checkpoint, info, [task])
spec, random = checkpoint.spec, np.random.default_rng(0)
names = [form for form in info.forms if form != "drop"]
shape = spec.num_moe_layers, spec.num_experts
for _ in range(2):
    plans = {
        str(index): [[str(form) for form in row] for row in random.choice(names, shape)]
        for index in range(MAX_PASS_PROPOSALS)
    }
    measure(plans, lambda share: None)
stated = sum(term.num_bytes for term in measure.memory_terms())
print(stated)
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text(" ".join(f"word{index % 37} is {index}" for index in range(500)))
    return path


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("quantiser", ["nearest", "gptq_refit"])
def test_memory_stays_below_what_is_stated(quantiser: str, task: Path, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(
        tmp_path / "model",
        "olmoe",
        width=256,
        num_hidden_layers=3,
        num_experts=8,
        intermediate_size=512,
    )
    stats = tmp_path / "stats"
    forms = ("drop", "tq1_0", "q4_k")
    calibrate(folder, [str(task)], stats, window_tokens=128, forms=forms, quantiser=quantiser)
    peak = measure_peak(IMPORTS, MEASURED, folder, task, stats)
    stated_bytes = int(peak.printed[0])
    assert peak.grown_bytes <= stated_bytes < 4 * peak.grown_bytes


def test_terms_by_hand(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_tiny_checkpoint(tmp_path / "model", "olmoe", width=256))
    spec = checkpoint.spec
    found = {
        term.name: term.num_bytes
        for term in search_terms(checkpoint, [256, 256, 100], ["drop", "q8_0"], 12)
    }
    one_bytes = spec.expert_weights * 34 // 32
    assert found["packed experts"] == spec.num_moe_layers * spec.num_experts * one_bytes
    assert found["hidden states"] == 2 * 14 * 612 * 4 * 256
    assert found["variant experts"] == 4 * spec.num_experts * spec.expert_weights


def test_too_little_memory_is_refused(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edge_moe.cli import run

    folder = make_tiny_checkpoint(tmp_path / "model", "olmoe", width=256)
    stats = tmp_path / "stats"
    calibrate(folder, [str(task)], stats, window_tokens=128, max_windows=4)
    monkeypatch.setattr(calibration_memory, "available_memory_bytes", lambda: 1_000_000)
    arguments = ["--stats", str(stats), "--budget", "2GB", "-o", str(tmp_path / "plan.json")]
    assert run(["plan", str(folder), *arguments]) == BudgetError.exit_code
    message = " ".join(capsys.readouterr().err.split())
    assert re.search("measuring plans; memory at most .* MB beside the libraries", message)
    assert "only 1.00 MB is available: use --no-search" in message
