"""`optimum-cli export edge-moe`: registered as optimum's own subpackages are, same options."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import ArgumentParser
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from hand_plan import hand_plan, tree

pytest.importorskip("optimum.commands.optimum_cli", reason="the extra optimum is not installed")

from edge_moe.checkpoint import Checkpoint  # noqa: E402
from edge_moe.commands import optimum_export  # noqa: E402
from edge_moe.converters.build import build  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def optimum_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    """optimum's own entry point, which finds the command through its namespace."""
    code = "from optimum.commands.optimum_cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_the_command_builds_what_edge_moe_builds(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen3_moe")
    plan = hand_plan(Checkpoint(source), [["drop"] + ["q4_0"] * 7] * 2)
    plan.save(tmp_path / "plan.json")
    output = tmp_path / "a" / "out"
    done = optimum_cli(
        *("export", "edge-moe", tmp_path / "plan.json", "--output", output),
        *("--target", "native", "--model", source),
    )
    assert done.returncode == 0, done.stderr
    build(plan, tmp_path / "b" / "out", model=source)
    assert tree(output) == tree(tmp_path / "b" / "out")


def test_errors_keep_their_line_and_code(tmp_path: Path) -> None:
    done = optimum_cli("export", "edge-moe", tmp_path / "none.json", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "error: plan" in done.stderr and "does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_option_of_build_is_there_and_is_handed_on() -> None:
    parser = ArgumentParser()
    optimum_export.EdgeMoeExportCommand.parse_args(parser)
    words = ["p.json", "-o", "out", "--target", "onnx", "--onnx-exact", "--model", "m"]
    found = optimum_export.command_line(parser.parse_args(words))
    assert sorted(found) == sorted(
        ["build", "p.json", "--output=out", "--target=onnx", "--onnx-exact", "--model=m"]
    )
    options = {name for each in optimum_export.build_parameters() for name in each.names}
    listed = parser.format_help()
    assert {"--output", "--target", "--model", "--onnx-standard"} <= options
    assert all(name in listed for name in options if name.startswith("--"))


def test_an_optimum_onnx_for_older_transformers_is_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions = {"optimum-onnx": "0.1.0", "transformers": "5.23.0"}
    monkeypatch.setattr(optimum_export, "version", versions.__getitem__)
    (warning,) = optimum_export.companion_warnings()
    assert "optimum-onnx 0.1.0 is made for transformers below 4.58" in warning
    versions["transformers"] = "4.57.6"
    assert not optimum_export.companion_warnings()

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(optimum_export, "version", missing)
    assert not optimum_export.companion_warnings()
