"""The commands that a report prints lead to the same artefact again, from any folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from hand_plan import hand_plan, uniform_forms

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.model_card import base_model, model_card
from edge_moe.demo import build_assets
from edge_moe.measurement import Provenance
from edge_moe.plan import CalibrationOptions, Plan, SearchRecord
from edge_moe.reproduce import (
    build_commands,
    model_name,
    prompt_options,
    replay,
    without_folders,
)


@pytest.fixture
def plan(tiny_checkpoint: TinyCheckpoint) -> Plan:
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe"))
    found = hand_plan(checkpoint, uniform_forms(checkpoint, 4), "native")
    options = CalibrationOptions(
        tasks=("code", "/my data/mine.jsonl"),
        window_tokens=128,
        max_windows=7,
        forms=("drop", "q8_0"),
    )
    return found.model_copy(update={"model": "/my models/it's", "calibration": options})


@dataclass
class _Searched:
    tasks: list[str]
    limit_seconds: float | None = None

    def record(self) -> SearchRecord:
        return SearchRecord(
            chosen="x",
            is_complete=True,
            seconds=1.0,
            trials=[],
            tasks=self.tasks,
            limit_seconds=self.limit_seconds,
        )


def test_every_option_is_named_and_quoted(plan: Plan) -> None:
    calibrate, make, build = map(shlex.split, build_commands(plan, "my out", "hf"))
    assert calibrate == [
        *("edge-moe", "calibrate", "/my models/it's", "--task", "code"),
        *("--task", "/my data/mine.jsonl", "--window-tokens", "128", "--max-windows", "7"),
        *("--forms", "drop,q8_0", "--quantiser", "nearest", "-o", "stats"),
    ]
    assert make[:5] == ["edge-moe", "plan", "/my models/it's", "--stats", "stats"]
    assert "--no-search" in make and make[-2:] == ["-o", "plan.json"]
    assert build == ["edge-moe", "build", "plan.json", "-o", "my out", "--target", "hf"]


def test_gradients_are_measured_again(plan: Plan) -> None:
    assert "--gradients" not in build_commands(plan, "out", "native")[0]
    found = plan.model_copy(update={"gradient_fingerprint": "0" * 64})
    assert "--quantiser nearest --gradients -o stats" in build_commands(found, "out", "native")[0]


def test_search_options(plan: Plan) -> None:
    assert plan.calibration is not None
    same = _Searched(list(plan.calibration.tasks), 30.0).record()
    other = _Searched(["prose"], 2.5).record()
    command = build_commands(plan.model_copy(update={"search": same}), "out", "native")[1]
    assert "--search-seconds 30" in command and "--task" not in command
    command = build_commands(plan.model_copy(update={"search": other}), "out", "native")[1]
    assert "--task prose --search-seconds 2.5" in command and "--no-search" not in command


def test_shards_are_measured_apart_and_merged(plan: Plan) -> None:
    assert plan.calibration is not None
    parts = plan.calibration.model_copy(update={"shards": ((0, 3), (2, 3))})
    lines = build_commands(plan.model_copy(update={"calibration": parts}), "out", "native")
    assert "--shard 0/3" in lines[0] and lines[0].endswith("-o stats-0")
    assert "--shard 2/3" in lines[1] and lines[1].endswith("-o stats-1")
    assert lines[2] == "edge-moe stats merge stats stats-0 stats-1"


def test_a_recorded_command_follows_its_artefact(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "mine.txt").touch()
    command = "edge-moe eval work/small/ --against full --task code --task=mine.txt --record"
    provenance = Provenance.here().model_copy(update={"command": command, "folder": str(tmp_path)})
    assert replay(provenance, model="work/small", folder=Path("here")) == (
        f"edge-moe eval here --against {tmp_path}/full --task code "
        f"--task={tmp_path}/mine.txt --record"
    )
    command = "edge-moe run out --prompt out"
    provenance = provenance.model_copy(update={"command": command})
    assert replay(provenance, model="out", folder=Path("x y")) == (
        "edge-moe run 'x y' --prompt out"
    )


def test_a_card_names_no_folder_of_this_machine(plan: Plan) -> None:
    search = _Searched(["/my data/other.txt"]).record()
    public = without_folders(plan.model_copy(update={"search": search}))
    text = "\n".join(build_commands(public, "out", "native"))
    assert "/my" not in text
    assert "--task mine.jsonl" in text and "--task other.txt" in text


def test_model_names() -> None:
    assert model_name("Qwen/Qwen3-30B-A3B") == "Qwen/Qwen3-30B-A3B"
    assert model_name("/cache/models--Qwen--Tiny/snapshots/abc") == "Qwen/Tiny"
    assert model_name("/models/mine") == "mine"
    assert model_name("/usr/lib/edge_moe/demo/assets/model") == "edge-moe-demo-model"


def test_the_card_of_a_shrunken_demo_model(demo_model: Path) -> None:
    assert (demo_model / "README.md").read_text(encoding="utf-8") == build_assets.MODEL_CARD
    assert base_model(str(demo_model), demo_model) == "edge-moe-demo-model"
    checkpoint = Checkpoint(demo_model)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4), "native")
    card = model_card(plan, checkpoint, "small", "native", [])
    assert "\nlicense: apache-2.0\n" in card and "licence is not repeated" not in card
    assert str(demo_model) not in card
    assert "\nedge-moe calibrate MODEL --task" in card and "\nedge-moe plan MODEL --stats" in card
    assert "\n```\n\nMODEL is the checkpoint, edge-moe-demo-model.\n\n| fingerprint" in card
    hub = plan.model_copy(update={"model": "some/model"})
    card = model_card(hub, checkpoint, "small", "native", [])
    assert "edge-moe plan some/model --stats" in card and "MODEL" not in card
    assert "\n```\n\n| fingerprint" in card


def test_a_model_for_plain_text_is_asked_without_its_chat_template(
    plan: Plan, tmp_path: Path
) -> None:
    assert plan.calibration is not None
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": []}')
    for tasks, options in ((("code",), ["--raw"]), (("code", str(chat)), [])):
        asked = plan.calibration.model_copy(update={"tasks": tasks})
        found = prompt_options(plan.model_copy(update={"calibration": asked}))
        assert found == ["--prompt", "...", *options]
