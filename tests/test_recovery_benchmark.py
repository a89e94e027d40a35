"""The ternary plan of `benchmarks/recovery.py` is one that `build` takes."""

from __future__ import annotations

from pathlib import Path

from conftest import TinyCheckpoint
from recovery import FORM, one_form_plan

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.package import Package


def test_every_expert_is_built_in_trits(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen3_moe", wide=True)
    package = Package(build(one_form_plan(Checkpoint(folder)), tmp_path / "out", model=folder))
    assert {expert.form for layer in package.manifest.layers for expert in layer.experts} == {FORM}
