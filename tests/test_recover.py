"""Recovery end to end on tiny checkpoints: gains, what is left alone, kills, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILY_NAMES, TinyCheckpoint, make_tiny_checkpoint
from hand_plan import hand_plan, random_forms, tree

from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import run
from edge_moe.converters import recover_memory
from edge_moe.converters.build import build
from edge_moe.converters.recover import RecoveryReport, recover
from edge_moe.converters.recover_memory import branch_terms, total_bytes
from edge_moe.converters.recover_student import add_branches, load_student
from edge_moe.converters.recover_teacher import TeacherCache, cache_bytes
from edge_moe.converters.recover_text import split_text
from edge_moe.converters.recover_train import BranchTraining, TrainSettings
from edge_moe.errors import BudgetError, DiskSpaceError, EdgeMoeError, InputError
from edge_moe.package import Package
from edge_moe.runtime.evaluate import evaluate
from edge_moe.runtime.session import Session
from edge_moe.runtime.tokenizer import load_tokenizer

TEXT = "def f(x):\n    return x + 1\n\nIt was the best of times, it was the worst of times.\n" * 15
FEW_STEPS = TrainSettings(rank=8, steps=12, learning_rate=0.01, warmup_steps=2, num_judgements=3)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("task") / "mine.txt"
    path.write_text(TEXT)
    return str(path)


def built(source: Path, output: Path, *forms: str) -> Path:
    checkpoint = Checkpoint(source)
    return build(hand_plan(checkpoint, random_forms(checkpoint, forms or ("q2_0",))), output)


def recovered(package: Path, source: Path, task: str, output: Path, **options: Any) -> Any:
    arguments: dict[str, Any] = {"settings": FEW_STEPS, "window_tokens": 64} | options
    return recover(package, source, [task], output, **arguments)


def kld(folder: Path, source: Path, task: str) -> float:
    (result,) = evaluate(folder, source, [task], window_tokens=64, max_windows=4)
    assert result.comparison is not None
    return result.comparison.mean_kld.value


# ---------------------------------------------------------------------------- what it does


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_part_of_the_loss_comes_back(
    family: str, tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    source = tiny_checkpoint(family)
    forms = ("q2_0",) if family == "deepseek_v3" else ("q2_0", "drop")  # it has groups
    package = built(source, tmp_path / "package", *forms)
    before = tree(package)
    report = recovered(package, source, task, tmp_path / "out")
    assert tree(package) == before
    assert report.losses[0].step == 0
    assert report.kept_step > 0
    assert report.row(report.kept_step).heldout_loss < 0.95 * report.losses[0].heldout_loss
    assert kld(tmp_path / "out", source, task) < 0.95 * kld(package, source, task)


@pytest.fixture(scope="module")
def pair(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(original, package) that the tests below share and never change."""
    source = tiny_checkpoint("qwen3_moe")
    return source, built(source, tmp_path_factory.mktemp("pair") / "package", "q2_0", "drop")


def test_the_new_package(pair: Any, task: str, tmp_path: Path) -> None:
    source, package = pair
    output = tmp_path / "out"
    report = recovered(package, source, task, output)
    old, new = Package(package), Package(output)
    assert new.manifest.layers == old.manifest.layers
    for layer in new.manifest.layers:
        name = layer.experts[0].file
        assert (output / name).stat().st_ino == (package / name).stat().st_ino, "linked, not copied"
    assert new.manifest.adapter is not None
    assert new.manifest.adapter.rank == 8
    stored = RecoveryReport.model_validate_json((output / "recovery.json").read_bytes())
    assert stored == report
    assert "## Recovery" in (output / "README.md").read_text()
    changed = [fit.layer_id for fit in report.routers if fit.is_kept]
    assert changed == [1], "layer 0 gets exact inputs, so its router is right already"
    assert new.manifest.resident_sha256 != old.manifest.resident_sha256
    assert not list(tmp_path.glob(".*")), "nothing is left behind"
    with Session.open(output, context_tokens=64) as session:
        assert np.isfinite(session.logits([1, 2, 3])).all()


def test_routers_only(pair: Any, task: str, tmp_path: Path) -> None:
    source, package = pair
    report = recovered(package, source, task, tmp_path / "out", branches=False)
    assert Package(tmp_path / "out").manifest.adapter is None
    assert not (tmp_path / "out" / "adapter.safetensors").exists()
    (fit,) = [fit for fit in report.routers if fit.is_kept]
    assert fit.overlap_after > fit.overlap_before
    assert report.losses == []


def test_an_exact_student_is_left_alone(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen3_moe")
    package = built(source, tmp_path / "package", "bf16")
    report = recovered(package, source, task, tmp_path / "out", branches=False)
    assert [fit.divergence_before for fit in report.routers] == [0.0, 0.0]
    assert not any(fit.is_kept for fit in report.routers)
    old, new = tree(package), tree(tmp_path / "out")
    for name in ("edge_moe.json", "resident.safetensors"):
        assert new[name] == old[name]


def test_documents_that_judge_are_not_learned_from(pair: Any, tmp_path: Path) -> None:
    _, package = pair
    path = tmp_path / "many.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{index} " * 60}) + "\n" for index in range(100, 117))
    )
    tokenizer = load_tokenizer(package)
    text = split_text([str(path)], tokenizer, 512, 64, None)
    seen = {True: set[str](), False: set[str]()}
    for window, flag in zip(text.windows, text.is_training, strict=True):
        seen[flag] |= set(tokenizer.decode(window).replace("<|endoftext|>", " ").split())
    whole = {flag: {word for word in words if len(word) == 3} for flag, words in seen.items()}
    assert whole[False] == {"105", "115"}
    heldout = {"104", "109", "114"}  # every fifth document: for evaluation, never read here
    assert whole[True] == {str(index) for index in range(100, 117)} - {"105", "115"} - heldout


def test_a_limit_on_windows_is_shared_out(pair: Any, task: str) -> None:
    _, package = pair
    tokenizer = load_tokenizer(package)

    def counts(tasks: list[str], max_windows: int) -> tuple[int, int]:
        text = split_text(tasks, tokenizer, 512, 16, max_windows)
        return len(text.indices(True)), len(text.indices(False))

    assert counts([task], 16) == (14, 2)
    assert counts([task, task], 16) == (14, 2)
    assert counts([task], 2) == (1, 1)
    assert counts([task, task], 1) == (2, 2)


# ---------------------------------------------------------------------------- kills


class Killed(Exception):
    pass


def training(pair: Any, task: str, folder: Path) -> BranchTraining:
    source, package = pair
    text = split_text([task], load_tokenizer(package), 512, 64, None)
    teacher = TeacherCache(folder / "original")
    with Session.open(source, context_tokens=64) as session:
        teacher.fill(session, text.windows)
    student = load_student(Package(package))
    branches = add_branches(student, 4, 4.0, seed=0)
    return BranchTraining(student, branches, text, teacher, FEW_STEPS, folder)


def test_a_resumed_training_ends_where_an_unbroken_one_ends(
    pair: Any, task: str, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = training(pair, task, tmp_path / "whole")
    whole.run(save_every=3)

    broken = training(pair, task, tmp_path / "broken")

    def kill_at_seven() -> None:
        if broken.step == 7:
            raise Killed

    with pytest.raises(Killed):
        broken.run(kill_at_seven, save_every=3)
    resumed = training(pair, task, tmp_path / "broken")
    assert resumed.step == 6, "the seventh step was not saved"
    resumed.run(save_every=3)
    for (name, one), two in zip(
        whole._parameters.items(), resumed._parameters.values(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=0, msg=name)
    same = [row.model_copy(update={"seconds": 0.0}) for row in whole.log]
    assert [row.model_copy(update={"seconds": 0.0}) for row in resumed.log] == same


def test_damaged_state_is_named(pair: Any, task: str, tmp_path: Path) -> None:
    (tmp_path / "branches.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"branches\.safetensors is damaged"):
        training(pair, task, tmp_path)


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_same_bytes(pair: Any, task: str, tmp_path: Path) -> None:
    source, package = pair
    settings = ("--steps", "60", "--rank", "4", "--window-tokens", "64")
    command = [sys.executable, "-m", "edge_moe", "recover", str(package), "--against", str(source)]
    command += ["--task", task, *settings, "-o"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment)
    process = subprocess.Popen([*command, str(tmp_path / "broken")], env=environment)
    state = tmp_path / ".broken.building" / "branches.safetensors"
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists(), "it was killed too late to prove anything"
    assert not (tmp_path / "broken").exists()
    subprocess.run([*command, str(tmp_path / "broken")], check=True, env=environment)
    whole, broken = tree(tmp_path / "whole"), tree(tmp_path / "broken")
    for name in ("adapter.safetensors", "resident.safetensors", "edge_moe.json", "plan.json"):
        assert whole[name] == broken[name], name


# ---------------------------------------------------------------------------- memory


@pytest.mark.slow
def test_peak_memory_stays_below_what_was_stated(demo_model: Path, tmp_path: Path) -> None:
    package = built(demo_model, tmp_path / "package", "tq1_0")
    code = (
        "import sys; from pathlib import Path; import transformers, torch;"
        "from edge_moe.package import Package;"
        "from edge_moe.converters.recover import *;"
        "from edge_moe.runtime.memory import peak_memory_bytes, resident_memory_bytes;"
        "start = resident_memory_bytes(); package, source, out = map(Path, sys.argv[1:]);"
        "recover(package, source, ['code'], out, max_windows=4, window_tokens=512,"
        "settings=TrainSettings(steps=2)); print(peak_memory_bytes() - start)"
    )
    arguments = [str(package), str(demo_model), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    report = RecoveryReport.model_validate_json((tmp_path / "out/recovery.json").read_bytes())
    stated, peak = total_bytes(report.memory_terms), int(done.stdout)
    assert peak < stated < 3 * peak


def test_too_little_memory_is_refused(
    pair: Any, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, package = pair
    with pytest.raises(BudgetError, match="--max-memory allows 1.00 MB") as caught:
        recovered(package, source, task, tmp_path / "out", max_memory_bytes=10**6)
    assert caught.value.minimum_bytes > 10**6
    monkeypatch.setattr(recover_memory, "available_memory_bytes", lambda: 10**6)
    with pytest.raises(BudgetError, match="available is 1.00 MB"):
        recovered(package, source, task, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_bill_of_the_branches(pair: Any) -> None:
    _, package = pair
    small, large = (branch_terms(Package(package), rank, 64) for rank in (4, 8))
    by_name = {term.name: term.num_bytes for term in small}
    # two layers, o_proj 64 x 128: eight float32 copies of A [4, 128] and B [64, 4] each
    assert by_name["branches"] == 2 * 8 * 4 * (4 * 128 + 64 * 4)
    assert total_bytes(large) - total_bytes(small) == by_name["branches"]


# ---------------------------------------------------------------------------- bad input


def test_no_room_for_the_state_is_said_before_training(
    pair: Any, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, package = pair
    text = split_text([task], load_tokenizer(package), 512, 64, None)
    predictions_bytes = cache_bytes(sum(map(len, text.windows)))
    usage = shutil.disk_usage(tmp_path)._replace(free=predictions_bytes)
    monkeypatch.setattr("edge_moe.files.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskSpaceError, match="predictions and the training's state needs"):
        recovered(package, source, task, tmp_path / "out", routers=False)


def _existing(paths: dict[str, Path]) -> dict[str, Any]:
    paths["output"].mkdir()
    (paths["output"] / "mine").write_text("keep")
    return {}


def _other_original(paths: dict[str, Path]) -> dict[str, Any]:
    return {"source": make_tiny_checkpoint(paths["output"].parent / "other", "olmoe")}


def _damaged(paths: dict[str, Path]) -> dict[str, Any]:
    copy = paths["output"].parent / "copy"
    shutil.copytree(paths["package"], copy)
    with (copy / "resident.safetensors").open("r+b") as handle:
        handle.seek(-1, 2)
        handle.write(b"\x7f")
    return {"package": copy}


def _recovered_already(paths: dict[str, Path]) -> dict[str, Any]:
    copy = paths["output"].parent / "copy"
    shutil.copytree(paths["package"], copy)
    (copy / "recovery.json").write_text("{}")
    return {"package": copy}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_existing, "already exists"),
        (_other_original, "give the checkpoint it was built from"),
        (_recovered_already, "was recovered already"),
        (_damaged, r"resident\.safetensors is damaged"),
        (lambda _: {"routers": False, "branches": False}, "nothing to recover"),
        (lambda _: {"window_tokens": 4096}, "exceed the model's context of 512"),
        (lambda _: {"window_tokens": 500, "max_windows": 1, "task": "short"}, "another judge"),
        (lambda _: {"task": "no such task"}, "neither a shipped task"),
        (lambda _: {"settings": TrainSettings(rank=65), "routers": False}, "use --rank 64 or less"),
        (lambda paths: {"package": paths["source"]}, "not a finished edge-moe package"),
    ],
)
def test_bad_input_is_named(
    change: Callable[[dict[str, Path]], dict[str, Any]],
    message: str,
    pair: Any,
    task: str,
    tmp_path: Path,
) -> None:
    source, package = pair
    paths = {"source": source, "package": package, "output": tmp_path / "out"}
    options: dict[str, Any] = {"source": source, "package": package, "task": task}
    options |= change(paths)
    if options["task"] == "short":
        (tmp_path / "short.txt").write_text("a few words")
        options["task"] = str(tmp_path / "short.txt")
    with pytest.raises(EdgeMoeError, match=message):
        recovered(output=tmp_path / "out", **options)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("options", "message", "exit_code"),
    [
        (["--learning-rate", "0"], "--learning-rate is 0", 2),
        (["--no-router", "--no-branches"], "nothing to recover", 2),
        (["--max-memory", "1MB"], "use smaller windows", 3),
        (["--max-memory", "much"], "memory size 'much' is not understood", 2),
    ],
)
def test_the_command_line(
    options: list[str],
    message: str,
    exit_code: int,
    pair: Any,
    task: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, package = pair
    line = ["recover", str(package), "--against", str(source), "--task", task, "-o"]
    assert run([*line, str(tmp_path / "out"), *options]) == exit_code
    assert message in capsys.readouterr().err


def test_a_command_that_works(
    pair: Any, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, package = pair
    line = ["recover", str(package), "--against", str(source), "--task", task]
    settings = ["--steps", "2", "--rank", "2", "--window-tokens", "64", "--max-windows", "4"]
    assert run([*line, *settings, "-o", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert "memory at most" in told
    assert "next: edge-moe eval" in told


def test_a_lora_file_that_cannot_be_written_is_refused_before_training(
    tiny_checkpoint: TinyCheckpoint,
    pair: Any,
    task: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gguf")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("this is too late")

    monkeypatch.setattr("edge_moe.converters.recover.recover", never)
    unknown = tiny_checkpoint("deepseek_v2")
    unexported = built(unknown, tmp_path / "package", "q8_0")
    options = ["--task", task, "-o", str(tmp_path / "out"), "--gguf-lora"]
    assert run(["recover", str(unexported), "--against", str(unknown), *options]) == 2
    assert "llama.cpp's deepseek2 ranks groups of experts" in capsys.readouterr().err
    source, package = pair
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert run(["recover", str(package), "--against", str(source), *options]) == 2
    assert "needs the package 'gguf', which is not installed" in capsys.readouterr().err


def test_nothing_gained_is_no_error_and_no_lora_file(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    source = tiny_checkpoint("qwen3_moe")
    package = built(source, tmp_path / "package", "bf16")
    line = ["recover", str(package), "--against", str(source), "--task", task, "--no-branches"]
    settings = ["--window-tokens", "64", "--max-windows", "4", "--gguf-lora"]
    assert run([*line, *settings, "-o", str(tmp_path / "out")]) == 0
    assert "nothing was gained, so there is no" in capsys.readouterr().err
    assert not (tmp_path / "out/adapter.gguf").exists()
