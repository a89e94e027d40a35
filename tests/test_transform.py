"""Transformed checkpoints: what must not change does not, and everything loads them."""

from __future__ import annotations

import dataclasses
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
from hand_plan import fused_copy, hand_plan, tree
from masked_routing import mask_routers
from peak_memory import measure_peak, needs_proc
from test_export_hf import load as load_plain
from test_export_hf import logits as plain_logits
from transform_cases import (
    MERGING,
    TEXT,
    block_inputs,
    load,
    logits,
    rearranged,
    reorder_hidden_units,
)
from transformers import AutoTokenizer

from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import run as run_cli
from edge_moe.converters import calibration_memory, transform_scores
from edge_moe.converters import transform as transforming
from edge_moe.converters.calibrate import calibrate
from edge_moe.converters.calibrate_gradients import calibrate_with_gradients
from edge_moe.converters.gradient_memory import gradient_terms
from edge_moe.converters.sidecar import add_older_rope_keys, patch_expert_width
from edge_moe.converters.transform import transform
from edge_moe.converters.transform_memory import transform_terms
from edge_moe.converters.transform_record import TransformRecord
from edge_moe.converters.transform_request import TextLimits
from edge_moe.converters.transform_scores import Scores
from edge_moe.converters.transforms import METHODS
from edge_moe.errors import BudgetError, EdgeMoeError, InputError, StatsError, TargetError
from edge_moe.inspect import inspect_model
from edge_moe.spec import ModelSpec
from edge_moe.stats import ExpertStats
from edge_moe.tasks import task_windows

WINDOW_TOKENS = 32
LIMITS = TextLimits(window_tokens=WINDOW_TOKENS)
FEWER = tuple(name for name, method in METHODS.items() if method.shrinks == "experts")
PAIRS: dict[str, dict[str, Any]] = {"ream": {"group_size": 2}, "sub-moe": {"align": "yes"}}
"""Settings under which every expert finds its copy, whatever the order of its hidden units: else
REAM's first centroid takes all others, and Sub-MoE averages units as they are stored."""
Stats = Callable[[Path], Path]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("task") / "mine.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def stats_of(task: str, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    """`stats_of(folder)`: statistics of a checkpoint, calibrated once."""
    known: dict[str, Path] = {}

    def measure(folder: Path) -> Path:
        key = Checkpoint(folder).fingerprint
        if key not in known:
            known[key] = tmp_path_factory.mktemp("stats") / "stats"
            calibrate(folder, [task], known[key], window_tokens=WINDOW_TOKENS, forms=())
        return known[key]

    return measure


@pytest.fixture
def made_up_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of hidden units without a backward pass."""

    def scores(request: Any, folder: Path) -> Any:
        spec = request.checkpoint.spec
        shape = spec.num_moe_layers, spec.num_experts, spec.expert_width
        return Scores(request.info, neurons=np.random.default_rng(0).random(shape))

    monkeypatch.setattr(transforming, "measure_scores", scores)


def run(folder: Path, task: str, output: Path, method: str, **options: Any) -> TransformRecord:
    arguments: dict[str, Any] = {"limits": LIMITS} | options
    if "expert_width" not in options:
        arguments.setdefault("num_experts", 4)
    return transform(folder, [task], output, method, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("method", FEWER)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_keeping_all_experts_changes_no_byte(
    family: str,
    method: str,
    tiny_checkpoint: TinyCheckpoint,
    task: str,
    stats_of: Stats,
    tmp_path: Path,
) -> None:
    folder = tiny_checkpoint(family)
    run(folder, task, tmp_path / "out", method, num_experts=8, stats=stats_of(folder))
    assert_same_tensors(tmp_path / "out", folder)


def assert_same_tensors(output: Path, source: Path) -> None:
    found, expected = Checkpoint(output), Checkpoint(source)
    assert sorted(found.tensors) == sorted(expected.tensors)
    for name in expected.tensors:
        assert found.read_raw(name) == expected.read_raw(name), name
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    text = (source / "config.json").read_text()
    assert (output / "config.json").read_text() == add_older_rope_keys(text, expected.spec)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_keeping_the_whole_width_changes_no_byte(
    family: str, tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path, made_up_neurons: None
) -> None:
    folder = tiny_checkpoint(family)
    run(folder, task, tmp_path / "out", "heapr", expert_width=64)
    assert_same_tensors(tmp_path / "out", folder)


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_pruned_is_the_source_with_masked_routers(
    family: str,
    stacked: bool,
    tiny_checkpoint: TinyCheckpoint,
    task: str,
    stats_of: Stats,
    tmp_path: Path,
) -> None:
    folder = tiny_checkpoint(family)
    if stacked:
        folder = fused_copy(folder, tmp_path / "fused")
    record = run(folder, task, tmp_path / "out", "prune", stats=stats_of(folder))
    forms = []
    for layer in record.layers:
        kept = [members[0] for members in layer.members]
        forms.append(["bf16" if i in kept else "drop" for i in range(8)])
    checkpoint = Checkpoint(tiny_checkpoint(family))
    source = load_plain(checkpoint.folder)
    mask_routers(source, hand_plan(checkpoint, forms, "hf"), checkpoint.spec)
    found = plain_logits(load_plain(tmp_path / "out"))
    torch.testing.assert_close(found, plain_logits(source), atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", FEWER)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_tool_takes_the_result(
    family: str,
    method: str,
    tiny_checkpoint: TinyCheckpoint,
    task: str,
    stats_of: Stats,
    tmp_path: Path,
) -> None:
    folder, output = tiny_checkpoint(family), tmp_path / "out"
    run(folder, task, output, method, stats=stats_of(folder))
    assert torch.isfinite(logits(output)).all()
    assert inspect_model(str(output)) is not None
    assert Checkpoint(output).spec.num_experts == 4
    stats = calibrate(output, [task], tmp_path / "again", window_tokens=WINDOW_TOKENS, forms=())
    assert stats.routed_tokens.shape[1] == 4


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_narrow_experts_load(
    family: str, tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path, made_up_neurons: None
) -> None:
    folder, output = tiny_checkpoint(family), tmp_path / "out"
    record = run(folder, task, output, "heapr", expert_width=32)
    assert torch.isfinite(logits(output)).all()
    found, source = Checkpoint(output), Checkpoint(folder)
    assert found.spec.expert_width == 32 and found.spec.num_experts == 8
    kept = [i for i in range(64) if i in kept_units(source, found)]
    gate, up, down = source.expert(record.layers[0].layer_id, 3)
    for part, expected in zip(
        found.expert(record.layers[0].layer_id, 3),
        (gate[kept], up[kept], down[:, kept]),
        strict=True,
    ):
        np.testing.assert_array_equal(part, expected)


def kept_units(source: Checkpoint, found: Checkpoint) -> list[int]:
    """Units of expert 3 of the first MoE layer with the largest made-up scores."""
    spec = source.spec
    shape = spec.num_moe_layers, spec.num_experts, spec.expert_width
    scores = np.random.default_rng(0).random(shape)[0, 3]
    return [int(i) for i in np.argsort(-scores)[: found.spec.expert_width]]


def test_statistics_without_gradients_rank_no_hidden_units(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    folder, stats = tiny_checkpoint("qwen3_moe"), tmp_path / "stats"
    calibrate(folder, [task], stats, forms=("drop",), quantiser="nearest")
    with pytest.raises(InputError, match="hold no loss gradients, which heapr scores come from"):
        run(folder, task, tmp_path / "out", "heapr", expert_width=32, stats=stats)
    assert not (tmp_path / "out").exists()


def test_merging_copies_changes_nothing(task: str, stats_of: Stats, tmp_path: Path) -> None:
    """With top_k 1 a token's gate is 1, so it does not matter which of two copies it chose.

    Sub-MoE finds copies whoever is routed to; the others rank by routing, where torch breaks ties.
    """
    folder = make_tiny_checkpoint(
        tmp_path / "source", "qwen3_moe", num_experts_per_tok=1, dtype="float32"
    )
    rearranged(folder, [0, 1, 2, 3] * 2)
    run(folder, task, tmp_path / "out", "sub-moe", stats=stats_of(folder))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*MERGING, "dern", "naee", "prune"])
def test_merging_copies_that_are_never_chosen_changes_nothing(
    method: str, task: str, stats_of: Stats, tmp_path: Path
) -> None:
    """Top-2 of sigmoid scores in groups; a selection bias keeps the copies from being chosen."""
    folder = make_tiny_checkpoint(tmp_path / "source", "deepseek_v3", dtype="float32")
    rearranged(folder, [0, 1, 0, 1, 4, 5, 4, 5])
    reorder_hidden_units(folder, [2, 3, 6, 7])
    set_biases(folder, [0.0, 0.1, -9.0, -9.0] * 2)
    run(folder, task, tmp_path / "out", method, stats=stats_of(folder), settings=PAIRS.get(method))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), atol=1e-4, rtol=1e-4)


def set_biases(folder: Path, values: list[float]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.tensor(values)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("method", FEWER)
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_the_order_of_experts_does_not_matter(
    family: str, method: str, task: str, stats_of: Stats, tmp_path: Path
) -> None:
    source = make_tiny_checkpoint(tmp_path / "source", family, dtype="float32")
    other = rearranged(shutil.copytree(source, tmp_path / "other"), [2, 0, 3, 1, 6, 7, 4, 5])
    for folder in (source, other):
        run(folder, task, tmp_path / f"{folder.name}-out", method, stats=stats_of(folder))
    torch.testing.assert_close(
        logits(tmp_path / "other-out"), logits(tmp_path / "source-out"), atol=2e-4, rtol=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ream", "m-smoe"])
def test_what_the_next_layer_sees(
    method: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """REAM's second layer is given what the merged first layer computes; M-SMoE's is not."""
    folder = make_tiny_checkpoint(tmp_path / "source", "qwen3_moe")
    seen: dict[int, torch.Tensor] = {}

    original = METHODS[method].run

    def spy(layer: Any) -> Any:
        seen[layer.layer_id] = layer.samples.inputs.clone()
        return original(layer)

    monkeypatch.setitem(METHODS, method, dataclasses.replace(METHODS[method], run=spy))
    run(folder, task, tmp_path / "out", method)
    windows = task_windows([task], "calibration", AutoTokenizer.from_pretrained(folder), 32)
    from_source = block_inputs(folder, 1, windows)
    from_output = block_inputs(tmp_path / "out", 1, windows)
    assert (from_source - from_output).abs().max() > 1e-2
    expected = from_output if METHODS[method].is_sequential else from_source
    torch.testing.assert_close(seen[1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["ream", "sub-moe", "prune"])
@pytest.mark.parametrize("moment", ["second layer", "before the commit", "small files"])
def test_an_interrupted_run_goes_on(
    method: str,
    moment: str,
    tiny_checkpoint: TinyCheckpoint,
    task: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    run(folder, task, tmp_path / "whole", method)
    with monkeypatch.context() as patch:
        interrupt(patch, moment, method)
        with pytest.raises(KeyboardInterrupt):
            run(folder, task, tmp_path / "out", method)
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(transform_scores, "calibrate", never)
        run(folder, task, tmp_path / "out", method)
    assert same_but_name(tree(tmp_path / "out"), tree(tmp_path / "whole"))
    assert not list(tmp_path.glob(".*"))


def never(*_: object, **__: object) -> None:
    raise AssertionError("this was done already")


def same_but_name(left: dict[str, bytes], right: dict[str, bytes]) -> bool:
    card = right["README.md"].replace(b"whole", b"out")
    return left == right | {"README.md": card}


def interrupt(patch: pytest.MonkeyPatch, moment: str, method: str) -> None:
    """Stop the second call of a step of the run."""
    from edge_moe.converters.transform_output import TransformOutput

    owner = TransformOutput
    name = "_write_small_files" if moment == "small files" else "write_layer"
    original = getattr(owner, name)
    calls: list[int] = []

    def step(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if moment == "before the commit":
            original(self, *arguments)
            raise KeyboardInterrupt
        if moment == "small files" or len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    patch.setattr(owner, name, step)


KILLED = """
import sys
from pathlib import Path
from edge_moe.converters.transform import transform
from edge_moe.converters.transform_request import TextLimits
model, task, output = sys.argv[1:]
transform(Path(model), [task], Path(output), "ream", num_experts=4, limits=TextLimits(32))
"""


@pytest.mark.slow
def test_a_killed_run_gives_the_same_bytes(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("qwen2_moe")
    run(folder, task, tmp_path / "whole", "ream")
    command = [sys.executable, "-c", KILLED, str(folder), task, str(tmp_path / "out")]
    kills = 0
    while not (tmp_path / "out").exists():
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for_progress(tmp_path, process, kills)
        if process.poll() is None and kills < 4:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        assert process.wait() in (0, -signal.SIGKILL)
    assert kills > 0
    assert same_but_name(tree(tmp_path / "out"), tree(tmp_path / "whole"))


def wait_for_progress(folder: Path, process: subprocess.Popen[bytes], kills: int) -> None:
    """Until a stage left a file behind that was not there before, later for every kill."""
    wanted = ["stats", "samples", "samples/work/hidden_0001.safetensors", "output/*.safetensors"]
    pattern = wanted[min(kills, len(wanted) - 1)]
    while process.poll() is None and not list((folder / ".out.building").glob(pattern)):
        time.sleep(0.005)


def test_super_experts_stay_as_they_are(
    tiny_checkpoint: TinyCheckpoint, task: str, stats_of: Stats, tmp_path: Path
) -> None:
    """An expert that hardly any token needs, but with a huge output: kept, alone, unchanged."""
    folder = tiny_checkpoint("qwen3_moe")
    stats = ExpertStats.load(stats_of(folder))
    expert_id = int(stats.routed_tokens[0].argmin())
    stats.max_output[0, expert_id] = 1e6
    stats.save(tmp_path / "stats")
    for method in ("prune", "dern", "m-smoe", "sub-moe", "naee", "ream"):
        output = tmp_path / method
        record = run(folder, task, output, method, num_experts=2, stats=tmp_path / "stats")
        assert record.super_experts == [(0, expert_id)]
        new_id = record.layers[0].members.index([expert_id])
        for found, expected in zip(
            Checkpoint(output).expert(0, new_id),
            Checkpoint(folder).expert(0, expert_id),
            strict=True,
        ):
            np.testing.assert_array_equal(found, expected)


def test_record_and_card(
    tiny_checkpoint: TinyCheckpoint, task: str, stats_of: Stats, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("olmoe")
    record = run(
        folder,
        task,
        tmp_path / "out",
        "sub-moe",
        settings={"truncate": "0.1", "seed": 3},
        stats=stats_of(folder),
        limits=TextLimits(WINDOW_TOKENS, None, 100),
        name="Qwen/Tiny-MoE",
    )
    assert record.num_tokens > 100 >= record.sample_tokens > 100 - WINDOW_TOKENS
    saved = TransformRecord.model_validate_json((tmp_path / "out/transform.json").read_bytes())
    assert saved == record
    assert saved.settings == {
        "router": "dominant",
        "align": "no",
        "truncate": 0.1,
        "seed": 3,
    }
    assert saved.model_fingerprint == Checkpoint(folder).fingerprint
    assert sorted(sum(saved.layers[1].members, [])) == list(range(8))
    card = (tmp_path / "out/README.md").read_text()
    assert 'base_model: "Qwen/Tiny-MoE"\n' in card
    assert "Every layer has 4 experts instead of 8." in card
    assert "edge-moe transform Qwen/Tiny-MoE --method" in card and "MODEL" not in card
    assert "--method sub-moe --experts 4" in card and "--set truncate=0.1" in card
    assert "--window-tokens 32 --sample-tokens 100 -o out" in card
    again = run(tmp_path / "out", task, tmp_path / "twice", "prune", num_experts=2)
    assert again.source_transform == json.loads((tmp_path / "out/transform.json").read_text())
    card = (tmp_path / "twice/README.md").read_text()
    assert "edge-moe transform MODEL --method" in card and "MODEL is the checkpoint, out." in card


def test_given_statistics_are_what_the_record_and_the_card_say(
    tiny_checkpoint: TinyCheckpoint,
    task: str,
    stats_of: Stats,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another --task beside them is not claimed, and no text of it mixed in."""
    folder = tiny_checkpoint("olmoe")
    stats, other = stats_of(folder), tmp_path / "other.txt"
    info = ExpertStats.load(stats).info
    other.write_text(TEXT.upper() * 2)
    line = ["transform", str(folder), "--task", str(other), "--window-tokens", "32"]
    line += ["--stats", str(stats), "--experts", "4", "--method"]
    assert run_cli([*line, "prune", "-o", str(tmp_path / "out")]) == 0
    assert "is of mine.txt; the text of --task was not used" in joined(capsys.readouterr().err)
    record = TransformRecord.model_validate_json((tmp_path / "out/transform.json").read_bytes())
    assert record.tasks == ["mine.txt"]
    assert record.data_fingerprint == info.data_fingerprint
    assert record.num_tokens == info.num_tokens
    assert record.sample_fingerprint is None
    card = (tmp_path / "out/README.md").read_text()
    assert "other" not in card and "made smaller for `mine.txt`" in card
    assert "--task mine.txt --stats stats" in card
    assert f"| statistics `stats`, sha256 | `{record.stats_fingerprint}` |" in card
    assert run_cli([*line, "m-smoe", "-o", str(tmp_path / "mixed")]) == 2
    message = joined(capsys.readouterr().err)
    assert "are of mine.txt, and method m-smoe would run layers on other.txt: give" in message
    assert not list(tmp_path.glob("*mixed*"))


def joined(told: str) -> str:
    return " ".join(told.split())


def test_samples_of_the_same_task_may_be_cut_otherwise(
    tiny_checkpoint: TinyCheckpoint, task: str, stats_of: Stats, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("olmoe")
    options: dict[str, Any] = {"stats": stats_of(folder), "limits": TextLimits(16)}
    record = run(folder, task, tmp_path / "out", "m-smoe", **options)
    assert record.data_fingerprint == ExpertStats.load(options["stats"]).info.data_fingerprint
    assert record.sample_fingerprint not in (None, record.data_fingerprint)
    card = (tmp_path / "out/README.md").read_text()
    assert f"layers were run on, sha256 | `{record.sample_fingerprint}` |" in card


def test_a_run_goes_on_with_the_same_statistics_only(
    tiny_checkpoint: TinyCheckpoint,
    task: str,
    stats_of: Stats,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What they hold counts, not where they lie."""
    folder = tiny_checkpoint("olmoe")
    stats = Path(shutil.copytree(stats_of(folder), tmp_path / "stats"))
    with monkeypatch.context() as patch:
        interrupt(patch, "second layer", "prune")
        with pytest.raises(KeyboardInterrupt):
            run(folder, task, tmp_path / "out", "prune", stats=stats)
    shutil.rmtree(stats)
    calibrate(folder, [task], stats, window_tokens=16, forms=())
    with pytest.raises(InputError, match="unfinished build of another"):
        run(folder, task, tmp_path / "out", "prune", stats=stats)
    record = run(folder, task, tmp_path / "out", "prune", stats=stats_of(folder))
    assert record.stats == "stats"


def test_width_says_which_forms_are_lost(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path, made_up_neurons: None
) -> None:
    folder = tiny_checkpoint("qwen3_moe", wide=True)
    record = run(folder, task, tmp_path / "out", "heapr", expert_width=128)
    assert {"q2_k", "q3_k", "q4_k", "tq1_0", "tq2_0"} <= set(record.lost_forms)
    assert {"q8_0", "q4_0", "q2_0", "bf16"} <= set(record.forms)
    assert "q2_k" in record.notes[0] and "q8_0" in record.notes[0]
    assert record.super_experts is None
    assert "| super experts | not looked for |" in (tmp_path / "out/README.md").read_text()
    for width in (100, 0, 288):
        with pytest.raises(InputError, match=f"cannot narrow experts to {width}: use a multiple"):
            run(folder, task, tmp_path / "bad", "heapr", expert_width=width)


def test_shared_expert_of_deepseek_keeps_its_width(tiny_checkpoint: TinyCheckpoint) -> None:
    text = (tiny_checkpoint("deepseek_v3") / "config.json").read_text()
    spec = ModelSpec.from_config(json.loads(text))
    patched = json.loads(patch_expert_width(text, spec, 32))
    assert patched == json.loads(text) | {"moe_intermediate_size": 32, "n_shared_experts": 2}
    with pytest.raises(TargetError, match="cannot narrow experts to 48.*use a divisor of 64"):
        patch_expert_width(text, spec, 48)


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("mc-smoe", {}, TargetError, "low-rank product plus a sparse rest"),
        ("magic", {}, InputError, "method 'magic' is unknown; known are .*naee"),
        ("prune", {"num_experts": 9}, InputError, "cannot keep 9 experts per layer.*use 2 to 8"),
        ("prune", {"num_experts": 1}, InputError, "cannot keep 1 experts"),
        ("prune", {"expert_width": 32}, InputError, "prune lowers the number.*--experts N"),
        ("heapr", {"num_experts": 4}, InputError, "heapr narrows experts: give --width N"),
        ("dern", {"settings": {"seed": 1}}, InputError, "dern has no setting 'seed'"),
        ("dern", {"settings": {"threshold": "2"}}, InputError, "threshold is '2': use -1 to 1"),
        ("dern", {"settings": {"threshold": "x"}}, InputError, "threshold is 'x'"),
        ("prune", {"settings": {"criterion": "x"}}, InputError, "criterion is 'x': use one of"),
    ],
)
def test_bad_requests_are_refused_before_the_work(
    method: str,
    options: dict[str, Any],
    error: type[EdgeMoeError],
    message: str,
    tiny_checkpoint: TinyCheckpoint,
    task: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        run(tiny_checkpoint("mixtral"), task, tmp_path / "out", method, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_experts", [2, 3, 5])
def test_groups_stay_equal(
    num_experts: int, tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("deepseek_v3")
    with pytest.raises(TargetError, match=f"cannot keep {num_experts} .* 2 groups, which must"):
        run(folder, task, tmp_path / "out", "prune", num_experts=num_experts)


def test_other_peoples_statistics_are_refused(
    tiny_checkpoint: TinyCheckpoint, task: str, stats_of: Stats, tmp_path: Path
) -> None:
    stats = stats_of(tiny_checkpoint("olmoe"))
    with pytest.raises(StatsError, match="belong to another model"):
        run(tiny_checkpoint("mixtral"), task, tmp_path / "out", "prune", stats=stats)


def test_too_little_memory_is_said_before_the_start(
    tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_memory, "available_memory_bytes", lambda: 1_000_000)
    with pytest.raises(BudgetError, match="1.00 MB is available: lower --sample"):
        run(tiny_checkpoint("mixtral"), task, tmp_path / "out", "naee")


def test_command(
    tiny_checkpoint: TinyCheckpoint,
    task: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    arguments = [str(tiny_checkpoint("olmoe")), "--task", task, "--window-tokens", "32"]
    arguments += ["--method", "prune", "--experts", "4", "--set", "criterion=frequency"]
    assert run_cli(["transform", *arguments, "-o", str(output)]) == 0
    assert "4 of 8 experts per layer" in capsys.readouterr().err
    assert load(output) is not None
    assert run_cli(["transform", *arguments, "--set", "x", "-o", str(tmp_path / "b")]) == 2
    assert "setting 'x' is not understood" in capsys.readouterr().err


IMPORTS = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from edge_moe.converters.transform import transform
from edge_moe.converters.transform_request import TextLimits
"""
MEASURED = """
model, task, stats, method, experts, width, output = sys.argv[1:]
limits = TextLimits(window_tokens=128)
options = {"num_experts": int(experts) or None, "expert_width": int(width) or None}
options |= {"limits": limits, "stats": Path(stats) if stats else None}
transform(Path(model), [task], Path(output), method, **options)
"""


def peak_bytes(*arguments: object) -> int:
    """What a transform adds to a process that has imported torch."""
    return measure_peak(IMPORTS, MEASURED, *arguments).grown_bytes


def stated_bytes(folder: Path, output: Path, method: str) -> int:
    """What `transform` said it would take at most to make `output`."""
    checkpoint, new = Checkpoint(folder), Checkpoint(output).spec
    record = TransformRecord.model_validate_json((output / "transform.json").read_bytes())
    num_tokens = record.sample_tokens
    terms = transform_terms(
        checkpoint,
        num_tokens,
        min(num_tokens, 128),
        new.num_experts * new.expert_weights,
        METHODS[method].scratch_bytes(checkpoint.spec, num_tokens),
    )
    return sum(term.num_bytes for term in terms)


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("method", FEWER)
def test_memory_stays_below_what_is_stated(
    method: str,
    task: str,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    stats_of: Stats,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "large"
    if not folder.exists():
        make_tiny_checkpoint(
            folder, "olmoe", width=256, num_hidden_layers=8, num_experts=16, intermediate_size=512
        )
    output = tmp_path / "out"
    peak = peak_bytes(folder, task, stats_of(folder), method, 8, 0, output)
    assert 0 < peak <= stated_bytes(folder, output, method)


@pytest.mark.slow
@needs_proc
def test_narrowing_stays_below_what_is_stated(task: str, tmp_path: Path) -> None:
    """Many hidden units and little else: the statistics of all layers are the largest part."""
    folder, stats, output = tmp_path / "model", tmp_path / "stats", tmp_path / "out"
    make_tiny_checkpoint(
        folder, "olmoe", width=16, num_hidden_layers=64, num_experts=8, intermediate_size=4096
    )
    gradients = calibrate_with_gradients(
        folder, [task], stats, window_tokens=128, forms=(), quantiser="nearest"
    )
    peak = peak_bytes(folder, task, stats, "heapr", 0, 2048, output)
    assert 0 < peak <= stated_bytes(folder, output, "heapr")
    terms = gradient_terms(Checkpoint(folder), gradients.info.num_tokens, 128)
    peak = peak_bytes(folder, task, "", "heapr", 0, 2048, tmp_path / "measured")
    measuring = sum(term.num_bytes for term in terms)
    assert 0 < peak <= max(measuring, stated_bytes(folder, output, "heapr"))
