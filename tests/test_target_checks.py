"""What a target cannot hold of a model is said by calibrate and plan, before the work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from fake_stats import fake_stats
from hand_plan import edit_config

from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import run
from edge_moe.converters.target_checks import check_model
from edge_moe.families import FAMILIES
from edge_moe.plan import Target


@pytest.fixture
def copied(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint("qwen3_moe"), tmp_path / "model")


def refusals(folder: Path, target: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What calibrate and plan say."""
    stats = fake_stats(Checkpoint(folder), ("q4_0", "f32", "int4_b64"))
    stats.save(folder.with_name("stats"))
    found = []
    for command in (
        ["calibrate", str(folder), "--task", "code"],
        ["plan", str(folder), "--stats", str(folder.with_name("stats")), "--budget", "2GB"],
    ):
        output = folder.with_name("out.json" if command[0] == "plan" else "out")
        assert run([*command, "--target", target, "-o", str(output)]) == 2
        found.append(" ".join(capsys.readouterr().err.split()))
        assert not output.exists()
    return found


def test_a_configuration_that_llama_cpp_does_not_compute(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(copied, use_sliding_window=True, sliding_window=64)
    for message in refusals(copied, "gguf", capsys):
        assert "llama.cpp's qwen3moe has no use_sliding_window=True" in message


def test_a_tokenizer_that_llama_cpp_does_not_have(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "tokenizer.json"
    content = json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}
    path.write_text(json.dumps(content))
    for message in refusals(copied, "gguf", capsys):
        assert "cannot express the normaliser 'Lowercase'" in message


def test_a_configuration_that_one_graph_cannot_hold(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx")
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    edit_config(copied, rope_parameters=scaling)
    for message in refusals(copied, "onnx", capsys):
        assert "rope_type 'dynamic' changes with the length of the text" in message


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_models_that_can_be_built_pass(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    source = Checkpoint(tiny_checkpoint(family))
    targets: list[Target] = ["native", "hf", "onnx"]
    if family not in ("deepseek_v2", "phimoe"):  # which llama.cpp routes otherwise
        targets.append("gguf")
    for target in targets:
        check_model(source, target)
