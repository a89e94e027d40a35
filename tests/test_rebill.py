"""A plan that is built as something else than it was made for carries that target's memory bill."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from hand_plan import hand_plan, uniform_forms

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.errors import BudgetError
from edge_moe.overhead import tokenizer_bytes
from edge_moe.package import Package
from edge_moe.plan import Plan
from edge_moe.rebill import rebill


@pytest.fixture
def checkpoint(tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    return Checkpoint(tiny_checkpoint("qwen3_moe"))


def _hf_plan(checkpoint: Checkpoint) -> Plan:
    return hand_plan(checkpoint, uniform_forms(checkpoint, 4), target="hf")


def test_dense_weights_take_four_bytes_in_the_native_runtime(checkpoint: Checkpoint) -> None:
    plan = _hf_plan(checkpoint)
    native = rebill(plan, checkpoint, "native")
    weights = sum(info.num_bytes // 2 for info in checkpoint.dense_tensors)  # bf16
    assert native.term("dense weights").num_bytes == 4 * weights
    assert native.term("experts").num_bytes == plan.term("experts").num_bytes
    assert native.term("runtime").num_bytes == plan.term("runtime").num_bytes
    assert (native.target, native.billed_target) == ("hf", "native")


def test_the_package_carries_its_own_bill(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = _hf_plan(checkpoint)
    built = build(plan, tmp_path / "out", model=checkpoint.folder, target="native")
    assert Package(built).plan == rebill(plan, checkpoint, "native")


def test_the_own_target_changes_nothing(checkpoint: Checkpoint) -> None:
    plan = _hf_plan(checkpoint)
    native = rebill(plan, checkpoint, "native")
    assert rebill(plan, checkpoint, "hf") == plan
    assert rebill(native, checkpoint, "native") == native


def test_there_and_back_is_the_measured_process_again(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_moe.rebill.runtime_overhead", lambda *_: (123_456, "measured"))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4))
    back = rebill(rebill(plan, checkpoint, "gguf"), checkpoint, "native")
    tokenizer = tokenizer_bytes(checkpoint.folder)
    assert back.term("runtime").num_bytes == 123_456 + tokenizer
    assert back.term("runtime").source == "measured"


def test_what_does_not_fit_there_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = _hf_plan(checkpoint)
    plan = plan.model_copy(update={"budget_bytes": plan.total_bytes})
    with pytest.raises(BudgetError, match="as native its experts do not fit .* --target native"):
        build(plan, tmp_path / "out", model=checkpoint.folder, target="native")
    assert not (tmp_path / "out").exists()
