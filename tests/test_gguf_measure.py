"""Plans of a GGUF file measured on held-out text: each as the file that `build` writes."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_tiny_checkpoint
from peak_memory import deep_checkpoint, measure_peak, needs_proc

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from float32_gguf import float32_gguf  # noqa: E402
from gguf_files import requantised  # noqa: E402
from hand_plan import hand_plan  # noqa: E402
from llama_worker import ask_llama  # noqa: E402

from edge_moe import metrics  # noqa: E402
from edge_moe.cli import run as run_command  # noqa: E402
from edge_moe.converters import calibration_memory, gguf_measure  # noqa: E402
from edge_moe.converters.build import GGUF_NAME, build  # noqa: E402
from edge_moe.converters.calibrate_gguf import calibrate_gguf  # noqa: E402
from edge_moe.converters.expert_squares import squares_in  # noqa: E402
from edge_moe.converters.gguf_measure import GgufPlanMeasure  # noqa: E402
from edge_moe.converters.slice_gguf import slice_gguf, write_trial_slice  # noqa: E402
from edge_moe.errors import DiskSpaceError  # noqa: E402
from edge_moe.formats import DROP  # noqa: E402
from edge_moe.gguf_model import GgufModel  # noqa: E402
from edge_moe.moments import moments_path  # noqa: E402
from edge_moe.plan import Plan  # noqa: E402
from edge_moe.plan_remarks import UNSEARCHED  # noqa: E402
from edge_moe.runtime.gguf_logits import gguf_tokenizer  # noqa: E402
from edge_moe.runtime.heldout import search_windows  # noqa: E402
from edge_moe.stats import ExpertStats  # noqa: E402
from edge_moe.trials import TimeUp  # noqa: E402

Ready = tuple[GgufModel, Path, str]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """A model with Q8_0 experts, its statistics packed by imatrix, and the text."""
    folder = tmp_path_factory.mktemp("measured")
    task = folder / "task.txt"
    task.write_text(" ".join(f"word{index % 37} is {index}" for index in range(400)))
    checkpoint = make_tiny_checkpoint(folder / "source", "qwen3_moe", dtype="float32", width=256)
    whole = float32_gguf(checkpoint, folder / "f32.gguf")
    model = GgufModel(requantised(whole, folder / "model.gguf", {"_exps": "Q8_0"}))
    options: dict[str, Any] = {"window_tokens": 64, "max_windows": 4, "forms": ("q2_k", "q4_k")}
    calibrate_gguf(model.path, [str(task)], folder / "stats", **options)
    return model, folder / "stats", str(task)


def opened(ready: Ready, work: Path) -> GgufPlanMeasure:
    model, stats, task = ready
    work.mkdir()
    info = ExpertStats.load(stats).info
    return GgufPlanMeasure(model, info, [task], work, squares_in(stats, model.spec))


def forms_of(model: GgufModel, *rows: tuple[str, Sequence[int]]) -> list[list[str]]:
    """[L][E] `(form, kept experts)` per layer."""
    count = model.spec.num_experts
    return [[form if expert in kept else DROP for expert in range(count)] for form, kept in rows]


def test_a_measured_plan_is_the_built_one(ready: Ready, tmp_path: Path) -> None:
    model, stats, task = ready
    every = tuple(range(model.spec.num_experts))
    plans = {
        "whole": forms_of(model, ("q8_0", every), ("q8_0", every)),
        "dropped": forms_of(model, ("q8_0", (0, 1, 3, 5)), ("q8_0", (1, 2, 6, 7))),
        "smaller": forms_of(model, ("q2_k", every), ("q4_k", every)),
    }
    measure, shares = opened(ready, tmp_path / "work"), list[float]()
    found = measure(plans, shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert not (tmp_path / "work" / "trial.gguf").exists()
    assert not found["whole"].any()
    with gguf_tokenizer(model.path) as tokenizer:
        windows = search_windows([task], tokenizer, model.active_parameters)
    window = windows[0][:128]
    reference = ask_llama(model.path, tmp_path, window).logits
    squares = squares_in(stats, model.spec)
    for name in ("dropped", "smaller"):
        plan = hand_plan(model, plans[name], "gguf")
        plan.calibration = ExpertStats.load(stats).info.options
        assert plan.quantiser == "imatrix"
        path = slice_gguf(plan, model, tmp_path / f"{name}.gguf", squares)
        logits = ask_llama(path, tmp_path, window).logits
        wanted = metrics.compare_tokens(logits, reference, window).kld
        np.testing.assert_allclose(found[name][: len(wanted)], wanted, rtol=1e-3, atol=1e-7)
        assert len(found[name]) == sum(len(each) - 1 for each in windows)
        assert found[name].mean() > 1e-4
    again = measure({"again": plans["smaller"]}, shares.append)["again"]
    np.testing.assert_array_equal(again, found["smaller"])  # from experts that are packed already


def test_a_plan_without_time_leaves_nothing(ready: Ready, tmp_path: Path) -> None:
    model = ready[0]
    measure = opened(ready, tmp_path / "work")
    plan = forms_of(model, *[("q2_k", range(model.spec.num_experts))] * 2)

    def stop(share: float) -> None:
        if share > 0:
            raise TimeUp

    with pytest.raises(TimeUp):
        measure({"plan": plan}, stop)
    assert not list((tmp_path / "work").glob("*.gguf"))


def test_disk_is_asked_for_before_it_is_needed(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text's logits and one plan's file; a plan of all experts is as large as the source."""
    model, wanted = ready[0], list[int]()
    monkeypatch.setattr(
        gguf_measure, "require_free_disk", lambda folder, needed, purpose: wanted.append(needed)
    )
    measure, found = opened(ready, tmp_path / "work"), list[int]()

    def look(share: float) -> None:
        files = [path.stat().st_size for path in (tmp_path / "work").iterdir()]
        found.append(sum(files))

    every = range(model.spec.num_experts)
    measure({"whole": forms_of(model, ("q8_0", every), ("q8_0", every))}, look)
    with gguf_tokenizer(model.path) as tokenizer:
        windows = search_windows([ready[2]], tokenizer, model.active_parameters)
    logits_bytes = 4 * model.spec.vocab_size * sum(map(len, windows))
    assert logits_bytes > model.file_bytes / 10, "not lost beside the file"
    assert wanted == [logits_bytes + model.file_bytes]
    headers_bytes = 128 * len(windows) + 1000  # of numpy's files; two keys of a slice
    assert logits_bytes + model.file_bytes <= max(found) <= wanted[0] + headers_bytes


@needs_proc
def test_no_logits_stay_in_memory(ready: Ready, tmp_path: Path) -> None:
    measure = opened(ready, tmp_path / "work")
    measure({"plan": forms_of(ready[0], *[("q8_0", (0, 1, 3, 5))] * 2)}, lambda share: None)
    assert len(list((tmp_path / "work").glob("*.npy"))) > 1
    assert str(tmp_path / "work") not in Path("/proc/self/maps").read_text()


def planned(
    ready: Ready, output: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[Plan, str]:
    model, stats, task = ready
    experts = sum(
        model.expert_bytes(layer) * model.spec.num_experts for layer in model.spec.moe_layer_ids
    )
    command = ["plan", str(model.path), "--stats", str(stats), "--ctx", "256", "-o", str(output)]
    fixed = 10**9
    assert run_command([*command, "--budget", f"{fixed}B", "--no-search"]) == 0
    whole = Plan.load(output).total_bytes
    budget = whole - experts + int(0.4 * experts)
    arguments = [*command, "--budget", f"{budget}B", "--task", task, *options]
    output.unlink()
    capsys.readouterr()
    assert run_command(arguments) == 0
    printed = capsys.readouterr()
    return Plan.load(output), " ".join((printed.err + printed.out).split())


def test_the_command_searches(
    ready: Ready, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, _ = planned(ready, tmp_path / "plan.json", capsys, "--search-seconds", "8")
    assert plan.search is not None and UNSEARCHED not in plan.warnings
    assert plan.search.tasks == [ready[2]] and "odd windows only" in plan.search.text
    trials = {trial.name: trial.kld for trial in plan.search.trials}
    assert len(trials) > 5 and plan.search.chosen in trials
    assert trials[plan.search.chosen] <= trials["default loss"]
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]  # nothing of the trials is left
    path = build(plan, tmp_path / "out", stats=ready[1]) / GGUF_NAME
    kept = {sum(form != DROP for form in row) for row in plan.forms}
    assert kept == {GgufModel(path).spec.num_experts}


@pytest.mark.parametrize("reason", ["memory", "disk", "moments", "text"])
def test_what_keeps_plans_from_being_measured_is_said(
    reason: str,
    ready: Ready,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stats = ready[1]
    wanted = {
        "memory": "not searching: .* use --no-search",
        "disk": "not searching: .*measuring plans needs",
        "moments": "not searching: .*layer_0000",
        "text": "packs by the calibration text",
    }[reason]
    if reason == "memory":
        monkeypatch.setattr(calibration_memory, "available_memory_bytes", lambda: 10**6)
    elif reason == "disk":
        monkeypatch.setattr("shutil.disk_usage", lambda _: _Full())
    elif reason == "moments":
        hidden = moments_path(stats, 0).rename(tmp_path / "hidden")
    else:
        monkeypatch.setattr(gguf_measure, "can_pack", lambda quantiser: False)
    try:
        plan, printed = planned(ready, tmp_path / "plan.json", capsys)
    finally:
        if reason == "moments":
            hidden.rename(moments_path(stats, 0))
    assert re.search(wanted, printed), printed
    assert plan.search is None and UNSEARCHED in plan.warnings


@pytest.mark.parametrize(
    ("reason", "num_measured"),
    [
        ("no room", 0),
        ("no room", 1),
        ("full disk", 2),
        ("llama.cpp", 0),
        ("llama.cpp", 2),
        ("decoding", 1),
        ("memory", 1),
    ],
)
def test_a_search_that_cannot_go_on_keeps_the_best_plan(
    reason: str,
    num_measured: int,
    ready: Ready,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everything that a machine may run out of while plans are measured."""
    from llama_cpp import Llama

    calls, first_eval = 0, Llama.eval

    def write(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        path = arguments[2]
        if calls <= num_measured:
            return write_trial_slice(*arguments)
        if reason == "no room":
            raise DiskSpaceError("a plan that is measured needs 9 GB")
        if reason == "full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if reason == "memory":
            raise MemoryError
        if reason == "decoding":
            monkeypatch.setattr(Llama, "eval", fails)
            return write_trial_slice(*arguments)
        path.write_bytes(b"GGUF and then nothing")

    def fails(*_: Any) -> None:
        monkeypatch.setattr(Llama, "eval", first_eval)
        raise RuntimeError("llama_decode returned -3")

    monkeypatch.setattr(gguf_measure, "write_trial_slice", write)
    plan, printed = planned(ready, tmp_path / "plan.json", capsys, "--search-seconds", "60")
    assert plan.search is not None and len(plan.search.trials) == num_measured
    assert calls == num_measured + 1, "nothing is tried after a failure"
    wanted = {
        "no room": "needs 9 GB",
        "full disk": "trial.gguf: No space left on device; free some space",
        "llama.cpp": "llama.cpp cannot load it",
        "decoding": "llama_decode returned -3",
        "memory": "memory ran out",
    }[reason]
    assert wanted in plan.search.failure and not plan.search.is_complete
    assert "no more could be measured" in printed and wanted.split(":")[0] in printed
    said = [text for text in plan.warnings if "the search ended early: after" in text]
    assert bool(said) == bool(num_measured) and (UNSEARCHED in plan.warnings) != bool(said)
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


class _Full:
    total, used, free = 10**9, 10**9, 10


IMPORTS = """
import sys
from pathlib import Path
from edge_moe.converters.gguf_measure import GgufPlanMeasure
from edge_moe.gguf_model import GgufModel
from edge_moe.stats import ExpertStats
"""
MEASURED = """
path, task, stats, work = sys.argv[1:]
model = GgufModel(Path(path))
measure = GgufPlanMeasure(model, ExpertStats.load(Path(stats)).info, [task], Path(work), None)
count = model.spec.num_experts
for form in ("q4_0", "q4_k", "q8_0"):
    row = [form] * (count - 1) + [form if form != "q8_0" else "drop"]
    measure({form: [row] * model.spec.num_moe_layers}, lambda share: None)
print(sum(term.num_bytes for term in measure.memory_terms()))
"""


@pytest.mark.slow
@needs_proc
def test_memory_is_stated(ready: Ready, tmp_path: Path) -> None:
    """Twelve layers of experts, of which llama.cpp repacks a copy where a type allows it."""
    whole = float32_gguf(deep_checkpoint(tmp_path / "source"), tmp_path / "f32.gguf")
    path = requantised(whole, tmp_path / "model.gguf", {"_exps": "Q8_0"})
    whole.unlink()
    options: dict[str, Any] = {"window_tokens": 64, "max_windows": 1, "forms": (DROP,)}
    calibrate_gguf(path, [ready[2]], tmp_path / "stats", quantiser="nearest", **options)
    (tmp_path / "work").mkdir()
    arguments = (path, ready[2], tmp_path / "stats", tmp_path / "work")
    peak = measure_peak(IMPORTS, MEASURED, *arguments)
    stated_bytes = int(peak.printed[-1])
    assert path.stat().st_size < peak.grown_bytes <= stated_bytes
