"""The demo: its bookkeeping with commands that only pretend, and the real thing once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edge_moe import cli
from edge_moe.demo import flow, full_bill, task_names
from edge_moe.demo.summary import Summary
from edge_moe.errors import InputError
from edge_moe.measurement import load_evals, load_runs
from edge_moe.plan import Plan


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The verbs that a demo would run; nothing runs, and building fails."""
    found: list[str] = []

    def pretend(demo: flow.Demo, verb: str, *arguments: object, **_options: Any) -> None:
        found.append(verb)
        if verb == "calibrate":
            demo.stats.mkdir()
            (demo.stats / "stats.json").touch()
        if verb == "build":
            raise InputError("no disk")

    monkeypatch.setattr(flow, "_command", pretend)
    monkeypatch.setattr(full_bill, "runtime_overhead", lambda *_: (400_000_000, "assumed"))
    return found


def run(work: Path, **options: int) -> None:
    options = {"budget_bytes": 4_000_000_000} | options
    flow.run_demo(work, "code", console=Console(file=io.StringIO()), **options)


def test_a_stopped_demo_goes_on(commands: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no disk"):
        run(tmp_path / "demo")
    assert commands == ["inspect", "calibrate", "plan", "build"]
    commands.clear()
    with pytest.raises(InputError, match="no disk"):
        run(tmp_path / "demo")
    assert commands == ["inspect", "plan", "build"]  # the calibration is already there


def test_other_settings_need_another_folder(commands: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no disk"):
        run(tmp_path / "demo")
    with pytest.raises(InputError, match="holds something else, or a demo with other settings"):
        run(tmp_path / "demo", budget_bytes=500_000_000)


def test_a_folder_with_other_things_is_left_alone(commands: list[str], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(InputError, match="choose another --output"):
        run(tmp_path)
    assert not commands


def test_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no demo task is called 'poetry'; known tasks: .*code"):
        flow.run_demo(tmp_path / "demo", "poetry")
    assert not (tmp_path / "demo").exists()


def test_a_failing_command_is_named(tmp_path: Path) -> None:
    demo = flow.Demo(tmp_path, tmp_path, "code", 1, Console(file=io.StringIO()))
    with pytest.raises(flow.StepError, match="`edge-moe inspect` ended with exit code 2"):
        flow._command(demo, "inspect", tmp_path / "nothing", is_captured=True)


def test_a_failing_step_has_said_why_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise flow.StepError("plan", 3)

    monkeypatch.setattr(flow, "run_demo", fail)
    assert cli.run(["demo", "-o", str(tmp_path / "demo")]) == 3
    assert capsys.readouterr().err == ""


def test_a_budget_that_nothing_fits_is_refused_before_any_work(
    commands: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["demo", "--budget", "410MB", "-o", str(tmp_path / "demo")]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: budget 410 MB is too small for the demo")
    assert not commands and not (tmp_path / "demo").exists()


def test_budget_is_written_exactly(tmp_path: Path) -> None:
    for num_bytes, text in ((412_300_000, "412.3MB"), (412_345_678, "412345678B")):
        demo = flow.Demo(tmp_path, tmp_path, "code", num_bytes, Console(file=io.StringIO()))
        assert flow._budget_text(demo) == text


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, width=120)
    report = flow.run_demo(tmp_path / "demo", "arithmetic", console=console)
    folder = tmp_path / "demo"

    summary = Summary.model_validate_json((folder / "summary.json").read_text())
    full, small = summary.full, summary.small
    assert small.disk_bytes < 0.7 * full.disk_bytes
    rounding = 100_000  # the demo's budget is rounded to 0.1 MB
    assert small.experts_bytes <= flow.SHARE * full.experts_bytes + rounding
    assert small.peak_bytes < full.peak_bytes
    assert summary.recovery_percent > 80
    assert full.exact_match is not None and small.exact_match is not None
    assert small.text and full.text

    plan = Plan.load(folder / "plan.json")
    assert plan.total_bytes <= summary.budget_bytes
    assert small.peak_bytes <= 1.05 * summary.budget_bytes
    (recorded,) = load_runs(folder / "small")
    assert recorded.peak_memory_bytes == small.peak_bytes
    assert recorded.provenance.command.startswith("edge-moe run ")
    evals = load_evals(folder / "small")
    assert {result.task for result in evals} == set(task_names())
    assert [result.in_task for result in evals].count(True) == 1
    assert "peak memory, measured" in output.getvalue()
    assert f"next: edge-moe run {folder / 'small'} --prompt ... --raw\n" in output.getvalue()
    assert report.stat().st_size > 10_000

    before = {path: path.stat().st_mtime_ns for path in (folder / "small").rglob("*")}
    flow.run_demo(folder, "arithmetic", console=console)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "small").rglob("*")}
