"""Branches merged at load: what they compute, what they cost, and damage that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import TinyCheckpoint
from hand_adapter import random_branches, with_adapter
from hand_plan import hand_plan, random_forms
from safetensors.torch import load_file, save_file

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.recover_student import add_branches, load_student
from edge_moe.errors import PackageError
from edge_moe.inspect import inspect_model
from edge_moe.package import Package
from edge_moe.runtime.model import file_sha256
from edge_moe.runtime.session import Session

IDS = [int(i) for i in np.random.default_rng(0).integers(1, 250, 40)]


@pytest.fixture(scope="module")
def package(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe"))
    forms = random_forms(checkpoint, ["q2_0", "drop", "q8_0"])
    return build(hand_plan(checkpoint, forms), tmp_path_factory.mktemp("adapter") / "package")


def logits(folder: Path) -> npt.NDArray[np.float32]:
    with Session.open(folder, context_tokens=64, kernels="exact") as session:
        return session.logits(IDS)


def student_logits(model: Any) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        found: npt.NDArray[np.float32] = model(torch.tensor([IDS])).logits[0].numpy()
    return found


def test_merged_equals_unmerged(package: Path, tmp_path: Path) -> None:
    model = load_student(Package(package))
    plain = student_logits(model)
    branches = add_branches(model, 4, 8.0, seed=1)
    for name, trained in random_branches(package).items():
        branches[name].load_state_dict(trained.state_dict())
    unmerged = student_logits(model)
    merged = logits(with_adapter(package, tmp_path / "out", branches))
    assert np.abs(unmerged - plain).max() > 0.1, "the branches must matter"
    assert np.abs(merged - unmerged).max() < 1e-4


def test_new_branches_change_nothing_bit_for_bit(package: Path, tmp_path: Path) -> None:
    model = load_student(Package(package))
    before = student_logits(model)
    branches = add_branches(model, 4, 4.0, seed=0)
    np.testing.assert_array_equal(student_logits(model), before)
    merged = logits(with_adapter(package, tmp_path / "out", branches))
    np.testing.assert_array_equal(merged, logits(package))


def test_the_student_computes_what_the_runtime_computes(package: Path) -> None:
    found = student_logits(load_student(Package(package)))
    assert np.abs(found - logits(package)).max() < 1e-4


def test_an_adapter_costs_no_memory(package: Path, tmp_path: Path) -> None:
    output = with_adapter(package, tmp_path / "out", random_branches(package))
    with (
        Session.open(package, context_tokens=64) as plain,
        Session.open(output, context_tokens=64) as merged,
    ):
        assert merged.memory() == plain.memory()
        assert merged.measured_terms == plain.measured_terms


def test_files_are_those_that_peft_reads(package: Path, tmp_path: Path) -> None:
    output = with_adapter(package, tmp_path / "out", random_branches(package, rank=4))
    tensors = load_file(output / "adapter.safetensors")
    prefix = "base_model.model.model.layers.1.self_attn.o_proj"
    assert tensors[f"{prefix}.lora_A.weight"].shape == (4, 128)
    assert tensors[f"{prefix}.lora_B.weight"].shape == (64, 4)
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert config["target_modules"] == ["o_proj"]
    record = Package(output).manifest.adapter
    assert record is not None
    assert record.sha256 == file_sha256(output / "adapter.safetensors")


def test_inspect_counts_the_adapter_on_disk(package: Path, tmp_path: Path) -> None:
    output = with_adapter(package, tmp_path / "out", random_branches(package, rank=4))

    def attention_bytes(folder: Path) -> int:
        parts = {each.name: each.num_bytes for each in inspect_model(str(folder)).components}
        return parts["attention"]

    # two layers, float32 A [4, 128] and B [64, 4]
    assert attention_bytes(output) - attention_bytes(package) == 2 * 4 * (4 * 128 + 64 * 4)


def edit_adapter(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors and make the checksum fit, as a wrong writer would."""
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    manifest = json.loads((folder / "edge_moe.json").read_text())
    manifest["adapter"] |= {"sha256": file_sha256(path), "num_bytes": path.stat().st_size}
    (folder / "edge_moe.json").write_text(json.dumps(manifest))


def test_a_changed_adapter_is_refused(package: Path, tmp_path: Path) -> None:
    output = with_adapter(package, tmp_path / "out", random_branches(package))
    path = output / "adapter.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(PackageError, match=r"adapter\.safetensors is damaged"):
        Session.open(output)
    path.write_bytes(raw[:-8])
    with pytest.raises(
        PackageError, match=r"adapter\.safetensors is truncated: \d+ bytes; at least"
    ):
        Session.open(output)


A = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"
B = "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"


def _rename(tensors: dict[str, torch.Tensor], name: str) -> None:
    for part in ("A", "B"):
        old = f"base_model.model.model.layers.1.self_attn.o_proj.lora_{part}.weight"
        tensors[f"base_model.model.{name}.lora_{part}.weight"] = tensors.pop(old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(A), "expected A"),
        (lambda t: t.update({A: t[A][:3].clone()}), "the manifest states rank 4"),
        (lambda t: t.update({A: t[A][:, :-1].clone()}), r"is \[64, 128\], its branch \[64, 127\]"),
        (lambda t: t.update({"weight": t.pop(A)}), "'weight' is not a LoRA tensor"),
        (lambda t: _rename(t, "model.layers.9.self_attn.o_proj"), "has no layer"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, package: Path, tmp_path: Path
) -> None:
    output = with_adapter(package, tmp_path / "out", random_branches(package))
    edit_adapter(output, change)
    with pytest.raises(PackageError, match=message):
        Session.open(output)
