"""The whole loop on a tiny random checkpoint of every family: calibrate, plan, build, run, eval."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import FAMILY_NAMES, TinyCheckpoint

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.calibrate import calibrate
from edge_moe.families import FAMILIES
from edge_moe.formats import DROP, expert_bytes
from edge_moe.package import Package
from edge_moe.plan import Plan
from edge_moe.planner import make_plan
from edge_moe.report.data import load_report
from edge_moe.runtime.evaluate import evaluate
from edge_moe.runtime.session import Session
from edge_moe.stats import ExpertStats

CONTEXT_TOKENS = 128
TEXT = "def add(a, b):\n    return a + b\n\nIt was a fine evening, and 12 + 7 = 19.\n" * 12


def _plan(folder: Path, stats: ExpertStats, expert_share: float) -> Plan:
    """A plan whose experts may take `expert_share` of their 16-bit bytes."""
    checkpoint = Checkpoint(folder)
    generous = make_plan(
        *(checkpoint, stats, 10**9),
        model=str(folder),
        context_tokens=CONTEXT_TOKENS,
        runtime=(10**8, "assumed"),
    )
    spec = checkpoint.spec
    one = expert_bytes("bf16", *spec.expert_shape)
    spared = round((1 - expert_share) * one * spec.num_experts * spec.num_moe_layers)
    return make_plan(
        *(checkpoint, stats, generous.total_bytes - spared),
        model=str(folder),
        context_tokens=CONTEXT_TOKENS,
        runtime=(10**8, "assumed"),
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loop(family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint(family)
    spec = Checkpoint(folder).spec
    text = tmp_path / "mine.txt"
    text.write_text(TEXT, encoding="utf-8")
    stats = calibrate(folder, [str(text)], tmp_path / "stats", window_tokens=128)
    assert stats.routed_tokens.sum() == stats.info.num_tokens * spec.top_k * spec.num_moe_layers

    plan = _plan(folder, stats, 0.4)
    plan.save(tmp_path / "plan.json")
    every = [form for row in plan.forms for form in row]
    assert set(every) - {"bf16"}, "a plan for 40 % of the bytes changes something"
    assert plan.total_bytes <= plan.budget_bytes

    output = build(Plan.load(tmp_path / "plan.json"), tmp_path / "out")
    records = [record for layer in Package(output).manifest.layers for record in layer.experts]
    assert len(records) == len(every) - every.count(DROP)
    assert sum(record.num_bytes for record in records) == plan.term("experts").num_bytes

    with Session.open(output, context_tokens=CONTEXT_TOKENS) as session:
        whole = session.generate_ids(list(range(3, 40)), 12, stop_at_eos=False)
    fewest = max(spec.top_k, len({record.form for record in records}))
    with Session.open(output, context_tokens=CONTEXT_TOKENS, num_slots=fewest) as session:
        assert session.generate_ids(list(range(3, 40)), 12, stop_at_eos=False) == whole
        assert session.statistics().misses > 0

    (result,) = evaluate(output, folder, [str(text)], window_tokens=64, max_windows=3)
    assert result.comparison is not None
    assert np.isfinite(result.comparison.mean_kld.value)
    assert result.comparison.mean_kld.value > 0
    result.save(output)
    assert load_report(output).evals[0].task == result.task


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_keeping_everything_changes_nothing(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(family)
    text = tmp_path / "mine.txt"
    text.write_text(TEXT, encoding="utf-8")
    stats = calibrate(folder, [str(text)], tmp_path / "stats", window_tokens=128)
    plan = _plan(folder, stats, 1.0)
    assert {form for row in plan.forms for form in row} == {"bf16"}
    assert plan.loss == 0
    output = build(plan, tmp_path / "out")
    (result,) = evaluate(output, folder, [str(text)], window_tokens=64, max_windows=2)
    assert result.comparison is not None
    assert result.comparison.max_kld == pytest.approx(0, abs=1e-9)
    assert result.comparison.same_top_p.value == 1.0
