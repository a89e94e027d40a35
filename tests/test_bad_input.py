"""Bad checkpoints, plans and disks: one line that names the thing, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import TinyCheckpoint
from hand_plan import edit_config, hand_plan, uniform_forms
from safetensors.torch import load_file, save_file

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.export_native import export_native
from edge_moe.errors import (
    CheckpointError,
    DiskSpaceError,
    EdgeMoeError,
    FormError,
    InputError,
    PlanError,
    SpecError,
    TargetError,
)
from edge_moe.onnx_folder import OnnxOptions
from edge_moe.plan import Plan


@pytest.fixture
def source(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint folder of one's own to damage."""
    return shutil.copytree(tiny_checkpoint("qwen3_moe"), tmp_path / "source")


def plan_for(folder: Path, form: str = "bf16") -> Plan:
    checkpoint = Checkpoint(folder)
    return hand_plan(checkpoint, uniform_forms(checkpoint, 4, form))


def check_refused(
    kind: type[EdgeMoeError], message: str, plan: Plan, output: Path, **options: object
) -> None:
    """`build` raises `kind` with a one-line message, and leaves nothing beside the output."""
    before = sorted(output.parent.glob("*"))
    with pytest.raises(kind, match=message) as caught:
        build(plan, output, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert sorted(output.parent.glob("*")) == before


def set_weight(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_folder(source: Path, tmp_path: Path) -> None:
    plan = plan_for(source)
    check_refused(
        SpecError, r"nowhere/config.json does not exist: give a folder", plan, tmp_path / "out",
        model=tmp_path / "nowhere",
    )  # fmt: skip


def test_missing_weight_file(source: Path, tmp_path: Path) -> None:
    plan = plan_for(source)
    (source / "model.safetensors").unlink()
    check_refused(
        CheckpointError, "neither model.safetensors nor", plan, tmp_path / "out", model=source
    )


def test_missing_shard(source: Path, tmp_path: Path) -> None:
    plan = plan_for(source)
    weight_map = dict.fromkeys(Checkpoint(source).tensors, "model-00002-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    check_refused(
        CheckpointError, "model-00002-of-00002.safetensors does not exist: download", plan,
        tmp_path / "out", model=source,
    )  # fmt: skip


@pytest.mark.parametrize("num_bytes", [0, 5, 100, 100_000])
def test_truncated_weight_file(num_bytes: int, source: Path, tmp_path: Path) -> None:
    plan = plan_for(source)
    os.truncate(source / "model.safetensors", num_bytes)
    check_refused(
        CheckpointError, "model.safetensors is truncated.*; download the file again", plan,
        tmp_path / "out", model=source,
    )  # fmt: skip


def test_weight_file_truncated_while_it_is_read(source: Path, tmp_path: Path) -> None:
    plan = plan_for(source)
    file_bytes = (source / "model.safetensors").stat().st_size

    def export(plan: Plan, checkpoint: Checkpoint, *rest: object) -> None:
        os.truncate(source / "model.safetensors", file_bytes // 2)
        export_native(plan, checkpoint, *rest)  # type: ignore[arg-type]

    with mock.patch("edge_moe.converters.build.export_native", export):
        check_refused(
            CheckpointError, "truncated while being read", plan, tmp_path / "out", model=source
        )


def test_wrong_shape(source: Path, tmp_path: Path) -> None:
    plan = plan_for(source)
    edit_config(source, moe_intermediate_size=96)
    message = r"gate_proj.weight' has shape \[64, 64\], config.json implies \[96, 64\]"
    check_refused(CheckpointError, message, plan, tmp_path / "out", model=source)


def test_unknown_architecture(source: Path, tmp_path: Path) -> None:
    plan = plan_for(source)
    edit_config(source, model_type="llama")
    message = "architecture 'llama' is not supported; supported are deepseek_v2,"
    check_refused(SpecError, message, plan, tmp_path / "out", model=source)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.mlp.experts.{}.down_proj.weight",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("form", ["bf16", "q8_0"])
def test_weights_that_are_not_finite(
    name: str, value: float, form: str, source: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(source)
    forms = uniform_forms(checkpoint, 8, form)
    name = name.format(5)
    set_weight(source, name, value)
    plan = hand_plan(Checkpoint(source), forms)
    for target in ("native", "hf") if form == "bf16" else ("native",):
        check_refused(
            CheckpointError, f"{name}' holds NaN or infinity", plan, tmp_path / "out",
            model=source, target=target,
        )  # fmt: skip


def test_dropped_expert_may_be_damaged(source: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(source)
    forms = uniform_forms(checkpoint, 4)
    dropped = forms[0].index("drop")
    set_weight(source, f"model.layers.0.mlp.experts.{dropped}.up_proj.weight", np.nan)
    build(hand_plan(Checkpoint(source), forms), tmp_path / "out", model=source)


def test_plan_of_another_model(
    source: Path, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    plan = plan_for(source)
    check_refused(
        PlanError, "the plan was made from .*source .* has the fingerprint", plan,
        tmp_path / "out", model=tiny_checkpoint("olmoe"),
    )  # fmt: skip


def test_plan_that_was_edited(source: Path, tmp_path: Path) -> None:
    plan = plan_for(source)
    cut = [[row[:6] for row in table] for table in (plan.forms, plan.saliency)]
    shorter = plan.model_copy(update={"forms": [["bf16"] * 6] * 2, "saliency": cut[1]})
    check_refused(
        PlanError, "top-2 of 6 experts, .* has top-2 of 8: plan again", shorter,
        tmp_path / "out", model=source,
    )  # fmt: skip
    moved = plan.model_copy(update={"moe_layer_ids": [1, 2]})
    check_refused(PlanError, r"MoE layers \[1, 2\]", moved, tmp_path / "out", model=source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget_bytes": -5}, "budget_bytes: Input should be greater than 0: make it again"),
        ({"context_tokens": 0}, "context_tokens: Input should be greater than 0"),
        ({"terms": []}, "terms hold no term 'experts': make it again"),
        ({"forms": [["nonsense"] * 8] * 2}, "layer 0 names the unknown form 'nonsense'"),
    ],
)
def test_plan_file_that_contradicts_itself(
    change: dict[str, object], message: str, source: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_for(source).model_dump(mode="json") | change))
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(path)
    assert "Value error" not in str(caught.value)


def test_plan_whose_bill_is_not_that_of_its_forms(source: Path, tmp_path: Path) -> None:
    plan = plan_for(source)
    forms = [list(row) for row in plan.forms]
    forms[0][plan.kept(forms[0])[0]] = "q8_0"
    check_refused(
        PlanError, "experts take 185088 bytes .* bill says 196608: the plan was edited",
        plan.model_copy(update={"forms": forms}), tmp_path / "out", model=source,
    )  # fmt: skip
    check_refused(
        PlanError, "takes 1.20 MB, more than its own budget of 1.00 kB: plan again",
        plan.model_copy(update={"budget_bytes": 1000}), tmp_path / "out", model=source,
    )  # fmt: skip


def test_form_that_does_not_fit(source: Path, tmp_path: Path) -> None:
    check_refused(
        FormError, "blocks of 256 weights; a row of 64", plan_for(source, "q4_k"),
        tmp_path / "out", model=source,
    )  # fmt: skip


def test_onnx_has_no_kernel_for_forms_of_ggml(source: Path, tmp_path: Path) -> None:
    check_refused(
        TargetError, "layer 0 is planned with bf16, which onnxruntime has no kernel for: plan",
        plan_for(source), tmp_path / "out", model=source, target="onnx",
    )  # fmt: skip


def test_gguf_does_not_know_integer_forms_of_onnx(source: Path, tmp_path: Path) -> None:
    forms = [["int4_b64"] * 8 for _ in Checkpoint(source).spec.moe_layer_ids]
    check_refused(
        TargetError, "layer 0 is planned as int4_b64, which ggml does not know: plan again",
        hand_plan(Checkpoint(source), forms), tmp_path / "out", model=source, target="gguf",
    )  # fmt: skip


def test_onnx_options_of_another_target(source: Path, tmp_path: Path) -> None:
    check_refused(
        InputError, "target native has no ONNX options", plan_for(source), tmp_path / "out",
        model=source, target="native", onnx=OnnxOptions(),
    )  # fmt: skip


def test_existing_output(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    check_refused(
        InputError, "out already exists: choose another path", plan_for(source), output,
        model=source,
    )  # fmt: skip
    assert (output / "mine.txt").read_text() == "precious"


def test_existing_file_as_output(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    check_refused(
        InputError, "out already exists", plan_for(source), tmp_path / "out", model=source
    )


def test_output_below_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    check_refused(
        InputError, "cannot build .*file/out", plan_for(source), tmp_path / "file" / "out",
        model=source,
    )  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root and mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    mounted = subprocess.run(options, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_too_small_a_disk_is_refused_before_writing(source: Path, small_disk: Path) -> None:
    for target in ("native", "hf"):
        check_refused(
            DiskSpaceError, r"out needs .* MB in .*disk, but only .* kB is free", plan_for(source),
            small_disk / "out", model=source, target=target,
        )  # fmt: skip


def test_disk_that_fills_up_while_building(source: Path, small_disk: Path) -> None:
    """Complete files stay for the next attempt; the output does not appear."""
    plan = plan_for(source)
    with (
        mock.patch("edge_moe.converters.export_native.require_free_disk"),
        pytest.raises(DiskSpaceError, match="is full: free some space and run the same command"),
    ):
        build(plan, small_disk / "out", model=source)
    assert not (small_disk / "out").exists()
    unfinished = small_disk / ".out.building" / "output"
    assert not [path for path in unfinished.iterdir() if path.name.endswith(".tmp")]
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    build(plan, small_disk / "out", model=source)
    assert [path.name for path in small_disk.iterdir()] == ["out"]


def test_mount_point_as_output(source: Path, small_disk: Path) -> None:
    check_refused(
        InputError, "is a mount point: choose a folder inside it", plan_for(source), small_disk,
        model=source,
    )  # fmt: skip
