"""The scripts in `benchmarks/`: each starts, and a comparison is summed up as its cells say."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest
import quality
from fake_scores import fake_score
from rich.console import Console

from edge_moe.compare.contenders import Kind
from edge_moe.compare.record import Cell, CompareOptions
from edge_moe.measurement import Provenance
from edge_moe.metrics import Estimate
from edge_moe.plan import SearchRecord
from edge_moe.published import PMQ_NAME

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = [path for path in sorted(BENCHMARKS.glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_starts(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # some set how threads wait
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 0
    assert "usage" in capsys.readouterr().out.lower()


def cell(share: float, plan_kld: float) -> Cell:
    return Cell(
        settings="0" * 64,
        options=CompareOptions(),
        provenance=Provenance.published(),
        model="tiny",
        task="code",
        share=share,
        full_expert_bytes=400,
        budget_bytes=int(share * 400),
        quantiser="nearest",
        num_in_task_tokens=10,
        num_off_task_tokens=0,
        in_task_base_ppl=Estimate(2.0, 0.1),
        off_task_base_ppl=None,
        search=SearchRecord(chosen="a", is_complete=share > 0.3, seconds=1.0, trials=[]),
        scores=[
            fake_score("edge-moe plan", Kind.PLAN, plan_kld),
            fake_score("reap, 4 bits", Kind.PRUNE, 0.08),
            fake_score("all q4_k", Kind.QUANTISE, 0.06),
            fake_score(PMQ_NAME, Kind.MIXED, 0.03, int(share * 400) - 1),
            fake_score("random, draw 1, 4 bits", Kind.RANDOM, 0.5),
        ],
        missing=[],
    )


def test_a_summary_counts_how_far_ahead_the_plan_is(capsys: pytest.CaptureFixture[str]) -> None:
    quality.print_summary([cell(0.5, 0.02), cell(0.25, 0.04)], Console(width=200))
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| code")]
    assert "3.0 x (all q4_k)" in rows[0] and "1.5 x" in rows[0]
    assert "1.5 x (all q4_k)" in rows[1] and "0.8 x" in rows[1]
    assert "lowest KL in 1 of 2 cells; behind in code 25.0% native" in printed
    assert "the search ran out of its 240 s" in printed


def test_where_nothing_else_fits_the_plan_is_lowest(capsys: pytest.CaptureFixture[str]) -> None:
    alone = cell(0.14, 0.2)
    alone = alone.model_copy(update={"scores": alone.scores[:1]})
    quality.print_summary([alone], Console(width=200))
    quality.print_by_size([alone], Console(width=200))
    assert "lowest KL in 1 of 1 cells" in capsys.readouterr().out


def test_all_tasks_of_a_size_are_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    quality.print_by_size([cell(0.5, 0.02), cell(0.5, 0.005)], Console(width=200))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 50.0%")]
    assert len(rows) == 1
    assert "0.005 - 0.02" in rows[0]
    assert "6.0 x (3.0 - 12.0)" in rows[0]  # all q4_k is the best single method
    assert "8.0 x (4.0 - 16.0)" in rows[0]  # pruning
    assert "3.0 x (1.5 - 6.0)" in rows[0]  # PMQ


def test_parts_are_compared_with_the_plain_program(capsys: pytest.CaptureFixture[str]) -> None:
    parts = [
        fake_score(quality.PLAIN, Kind.PLAN, 0.4),
        fake_score("relative change", Kind.PLAN, 0.8),
        fake_score("after experts moved", Kind.PLAN, 0.1),
    ]
    other = [*parts[:2], fake_score("after experts moved", Kind.PLAN, 0.4)]
    cells = [cell(0.5, 0.1).model_copy(update={"parts": each}) for each in (parts, other)]
    quality.print_parts(cells, Console(width=200))
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[3:]]
    assert [[text.strip() for text in row] for row in rows if row] == [
        [quality.PLAIN, "2", "1.000", "0", "0"],
        ["relative change", "2", "2.000", "0", "2"],
        ["after experts moved", "2", "0.500", "1", "0"],
    ]


def test_the_plot_is_the_same_file_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs the extra `bench`")
    cells = [cell(0.5, 0.02), cell(0.25, 0.04)]
    paths = tmp_path / "a.svg", tmp_path / "b.svg"
    for path in paths:
        quality.plot(cells, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert "edge-moe" in paths[0].read_text() and "code" in paths[0].read_text()
