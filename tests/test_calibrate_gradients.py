"""`calibrate --gradients`: both statistics of one run, packed once; shards, kills, mix-ups."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyCheckpoint
from stopped_runs import stopping_at_rename

from edge_moe.cli import run as run_command
from edge_moe.converters.calibrate import calibrate
from edge_moe.converters.calibrate_gradients import calibrate_with_gradients
from edge_moe.converters.form_loss import FormChange, FormLosses
from edge_moe.converters.gradient_work import GradientWork
from edge_moe.converters.staging import locked
from edge_moe.errors import InputError, StatsError
from edge_moe.gradient_stats import FormCost, GradientStats, load_gradients
from edge_moe.plan import Plan
from edge_moe.stats import ExpertStats

TEXT = "def f(x):\n    return x + 1\n\nIt was the best of times, it was the worst of times.\n" * 2
FORMS = ("q8_0", "q4_0")
OPTIONS: dict[str, Any] = {"window_tokens": 32, "forms": FORMS, "max_windows": 3}
FILES = ["gradient.json", "gradient.safetensors", "moments", "stats.json", "stats.safetensors"]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("task") / "mine.txt"
    path.write_text(TEXT)
    return str(path)


def assert_same(
    left: ExpertStats | GradientStats, right: ExpertStats | GradientStats, *, info: bool = True
) -> None:
    assert not info or left.info == right.info
    others = right.to_arrays()
    for name, array in left.to_arrays().items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


def assert_same_folder(left: Path, right: Path) -> None:
    assert sorted(os.listdir(left)) == sorted(os.listdir(right)) == FILES
    assert_same(ExpertStats.load(left), ExpertStats.load(right))
    assert_same(GradientStats.load(left), GradientStats.load(right))


@pytest.mark.parametrize("quantiser", ["nearest", "gptq_refit"])
def test_the_statistics_are_those_of_a_plain_calibration(
    tiny_checkpoint: TinyCheckpoint,
    task: str,
    tmp_path: Path,
    quantiser: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    plain = calibrate(folder, [task], tmp_path / "plain", quantiser=quantiser, **OPTIONS)
    added = tmp_path / "added"
    calibrate(folder, [task], added, quantiser=quantiser, **OPTIONS)
    calibrate_with_gradients(folder, [task], added, quantiser=quantiser, **OPTIONS)

    packed, changes = [], FormLosses.changes

    def counted(self: FormLosses, layer_id: int, *rest: Any) -> Iterator[FormChange]:
        packed.append(layer_id)
        return changes(self, layer_id, *rest)

    monkeypatch.setattr(FormLosses, "changes", counted)
    output = tmp_path / "both"
    found = calibrate_with_gradients(folder, [task], output, quantiser=quantiser, **OPTIONS)
    assert sorted(packed) == list(found.info.moe_layer_ids), "every expert is packed once"
    assert_same(found, plain)
    assert_same_folder(output, added)
    gradients = load_gradients(output, found.info)
    assert gradients is not None and gradients.info.quantiser == quantiser
    np.testing.assert_allclose(
        gradients.form_cost[FormCost.OUTPUT_CHANGE].values(), found.form_loss.values(), rtol=1e-9
    )
    for kind in FormCost:
        assert (gradients.form_cost[kind].values().sum(axis=(0, 1)) > 0).all()


def test_shards_are_merged_and_planned_with(
    tiny_checkpoint: TinyCheckpoint,
    task: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(tiny_checkpoint("qwen3_moe"))
    options = ["--task", task, "--window-tokens", "32", "--forms", ",".join(FORMS), "--gradients"]
    names = {"a": ["--shard", "0/2"], "b": ["--shard", "1/2"], "whole": ["--quantiser", "nearest"]}
    for name, shard in names.items():
        output = ["-o", str(tmp_path / name)]
        assert run_command(["calibrate", folder, *options, *shard, *output]) == 0
    assert "with loss gradients" in capsys.readouterr().err
    parts = [str(tmp_path / name) for name in "ab"]
    assert run_command(["stats", "merge", str(tmp_path / "all"), *parts]) == 0
    assert_same_folder(tmp_path / "all", tmp_path / "whole")
    plan = tmp_path / "plan.json"
    place = ["--budget", "65MB", "--ctx", "128", "--target", "gguf", "--no-search"]
    stats = ["--stats", str(tmp_path / "all")]
    assert run_command(["plan", folder, *stats, *place, "-o", str(plan)]) == 0
    assert Plan.load(plan).gradient_fingerprint
    for part in Path(parts[1]).glob("gradient.*"):
        part.unlink()
    capsys.readouterr()
    assert run_command(["stats", "merge", str(tmp_path / "again"), *parts]) == 2
    message = capsys.readouterr().err
    assert f"{parts[0]} holds loss gradients and {parts[1]} none: calibrate" in message
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_a_run_stopped_anywhere_goes_on_to_the_same_bits(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = tiny_checkpoint("qwen3_moe"), tmp_path / "whole"
    options = OPTIONS | {"max_windows": 1}
    calibrate_with_gradients(folder, [task], whole, **options)
    for stop in itertools.count():
        output = tmp_path / f"stopped-{stop}"
        try:
            with stopping_at_rename(stop, monkeypatch):
                calibrate_with_gradients(folder, [task], output, **options)
            break
        except KeyboardInterrupt:
            calibrate_with_gradients(folder, [task], output, **options)
            assert_same_folder(output, whole)
    # gradients: settings, 3 hidden states, loss and its gradient, 2 layers back, 2 results;
    # then: settings, 3 hidden states, moments and sums of 2 layers, 2 results
    assert stop == (1 + 3 + 2 + 2 * 2 + 2) + (1 + 3 + 2 * 2 + 2)


def test_a_plain_calibration_that_was_stopped_can_get_gradients(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = tiny_checkpoint("qwen3_moe"), tmp_path / "out"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edge_moe.converters.calibrate.add_moments", stop)
        with pytest.raises(KeyboardInterrupt):
            calibrate(folder, [task], output, **OPTIONS)
    found = calibrate_with_gradients(folder, [task], output, **OPTIONS)
    assert sorted(os.listdir(output)) == FILES
    assert_same(found, calibrate(folder, [task], tmp_path / "plain", **OPTIONS))


def test_runs_of_different_settings_do_not_share_a_folder(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    folder, output = tiny_checkpoint("qwen3_moe"), tmp_path / "out"
    options = OPTIONS | {"quantiser": "nearest"}
    calibrate(folder, [task], output, **options)
    other = options | {"window_tokens": 16}
    with pytest.raises(StatsError, match="window_tokens is 16 in one and 32 in the other"):
        calibrate_with_gradients(folder, [task], output, **other)
    assert "gradient_work" not in os.listdir(output)
    calibrate_with_gradients(folder, [task], output, **options)
    with pytest.raises(InputError, match="already holds finished statistics"):
        calibrate_with_gradients(folder, [task], output, **options)
    for name in ("stats.json", "stats.safetensors"):
        (output / name).unlink()
    with pytest.raises(StatsError, match="quantiser is nearest in one and gptq_refit"):
        calibrate(folder, [task], output, **OPTIONS)
    assert_same(
        calibrate(folder, [task], output, **options),
        calibrate(folder, [task], tmp_path / "plain", **options),
    )


def test_two_gradient_runs_cannot_share_a_folder(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    folder, output = tiny_checkpoint("qwen3_moe"), tmp_path / "out"
    work = output / "gradient_work"
    work.mkdir(parents=True)
    with locked(work / "lock", "held"):
        with pytest.raises(InputError, match="is being calibrated by another process"):
            calibrate_with_gradients(folder, [task], output, **OPTIONS)


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_failed_run_keeps_only_what_is_worth_it(
    tiny_checkpoint: TinyCheckpoint,
    task: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_begun: bool,
) -> None:
    folder, output = tiny_checkpoint("qwen3_moe"), tmp_path / "out"

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    target = "save_layer" if is_begun else "committing_hidden"
    monkeypatch.setattr(GradientWork, target, fail)
    with pytest.raises(OSError, match="No space left"):
        calibrate_with_gradients(folder, [task], output, **OPTIONS)
    assert output.exists() == is_begun
