"""Measurement files: written, read back, and refused when damaged."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_moe.errors import InputError
from edge_moe.measurement import (
    EvalResult,
    Provenance,
    RunMeasurement,
    load_evals,
    load_runs,
    this_command,
    this_machine,
)
from edge_moe.metrics import Comparison, Estimate
from edge_moe.plan import MemoryTerm
from edge_moe.runtime.accelerator import accelerator_name

HERE = Provenance.here(seed=7)
SOME = Estimate(0.5, 0.1)


def run_measurement(**changes: Any) -> RunMeasurement:
    values: dict[str, Any] = {
        "provenance": HERE,
        "model": "out",
        "model_kind": "package",
        "device": "cpu",
        "budget_bytes": 1000,
        "context_tokens": 512,
        "terms": [MemoryTerm(name="experts", num_bytes=600, source="plan")],
        "peak_memory_bytes": 650,
        "prompt_tokens": 3,
        "generated_tokens": 10,
        "load_seconds": 1.0,
        "prefill_seconds": 0.1,
        "decode_seconds": 2.0,
        "tokens_per_second": 5.0,
        "paging": {"hits": 3, "stall_seconds": 0.25},
    }
    return RunMeasurement(**(values | changes))


def eval_result(**changes: Any) -> EvalResult:
    values: dict[str, Any] = {
        "provenance": HERE,
        "model": "out",
        "model_kind": "package",
        "against": "full",
        "task": "code",
        "in_task": True,
        "window_tokens": 256,
        "num_windows": 4,
        "num_tokens": 1020,
        "perplexity": SOME,
        "base_perplexity": SOME,
        "comparison": Comparison(SOME, SOME, SOME, 0.1, 0.2, 0.3, 0.4, 0.5, SOME, SOME),
        "seconds": 1.5,
    }
    return EvalResult(**(values | changes))


def test_run_round_trip(tmp_path: Path) -> None:
    run = run_measurement()
    path = run.save(tmp_path)
    assert path.parent == tmp_path / "measurements"
    assert load_runs(tmp_path) == [run]
    assert run.planned_bytes == 600


def test_runs_come_oldest_first(tmp_path: Path) -> None:
    times = [datetime(2026, 1, day, tzinfo=UTC) for day in (2, 1, 3)]
    for time in times:
        run_measurement(provenance=HERE.model_copy(update={"time": time})).save(tmp_path)
    assert [run.provenance.time for run in load_runs(tmp_path)] == sorted(times)


def test_eval_round_trip_own_task_first(tmp_path: Path) -> None:
    off = eval_result(task="a/b c.jsonl", in_task=False)
    assert off.save(tmp_path).name.startswith("eval-b-c-")
    eval_result().save(tmp_path)
    assert load_evals(tmp_path) == [eval_result(), off]


def test_evals_of_files_do_not_overwrite_each_other(tmp_path: Path) -> None:
    tasks = ("code", "/data/code.jsonl", "/a/mine.jsonl", "/b/mine.jsonl", "/b/mine.txt")
    paths = {task: eval_result(task=task).save(tmp_path) for task in tasks}
    assert len(set(paths.values())) == len(tasks)
    assert paths["code"].name == "eval-code.json"
    assert eval_result(task="/a/../b/mine.txt").save(tmp_path) == paths["/b/mine.txt"]


def test_nothing_recorded(tmp_path: Path) -> None:
    assert load_runs(tmp_path) == []
    assert load_evals(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "has version 99, this edge-moe reads 1"),
        ({"version": True}, "has version True, this edge-moe reads 1"),
        ({"version": 1.0}, "has version 1.0, this edge-moe reads 1"),
        ({"perplexity": "high"}, "is damaged: perplexity"),
        ({"surprise": 1}, "is damaged: surprise"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = eval_result().save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        EvalResult.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"eval-code\.json does not exist: write one with `run"):
        EvalResult.load(tmp_path / "eval-code.json")


def test_a_gpu_is_named_where_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H1")
    assert accelerator_name("cuda") == "H1"
    assert accelerator_name("cpu") == ""


def test_truncated_file_is_named(tmp_path: Path) -> None:
    path = eval_result().save(tmp_path)
    path.write_text(path.read_text()[:50])
    with pytest.raises(InputError, match=r"eval-code\.json is not readable"):
        load_evals(tmp_path)


def test_machine_names_its_parts() -> None:
    machine = this_machine("some GPU")
    assert machine.cpu and machine.cores >= 1 and machine.ram_bytes > 10**8
    assert machine.packages["numpy"]
    assert machine.accelerator == "some GPU"


def test_command_is_ready_to_paste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/edge_moe/__main__.py", "run", "out", "--prompt", "a b"])
    assert this_command() == "edge-moe run out --prompt 'a b'"
    monkeypatch.setattr(sys, "argv", ["benchmarks/x.py", "--fast"])
    assert this_command() == "x.py --fast"
