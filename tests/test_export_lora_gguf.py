"""A LoRA file for llama.cpp computes what the merged package computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyCheckpoint
from hand_adapter import random_branches, with_adapter
from hand_plan import hand_plan, uniform_forms
from llama_worker import ask_llama

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.export_lora_gguf import export_lora_gguf
from edge_moe.errors import InputError, TargetError
from edge_moe.gguf_header import read_gguf_header
from edge_moe.runtime.session import Session

pytest.importorskip("gguf")

IDS = [int(i) for i in np.random.default_rng(0).integers(1, 250, 40)]


def other_rows(checkpoint: Checkpoint, layer_id: int, kept: list[int]) -> torch.Tensor:
    """Router rows of the kept experts, moved a little."""
    name = checkpoint.spec.router_tensor_names(layer_id)[0]
    rows = torch.from_numpy(checkpoint.read(name)[kept])
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(layer_id))
    return rows + 0.2 * rows.std() * noise


@pytest.mark.parametrize("name", ["demo", "olmoe"])
def test_llama_cpp_agrees_with_the_merged_package(
    name: str, demo_model: Path, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    source = demo_model if name == "demo" else tiny_checkpoint("olmoe")
    checkpoint = Checkpoint(source)
    forms = uniform_forms(checkpoint, 6, "f32")
    plan = hand_plan(checkpoint, forms)
    package = build(plan, tmp_path / "package")
    layer_id = checkpoint.spec.moe_layer_ids[-1]
    rows = {layer_id: other_rows(checkpoint, layer_id, plan.kept(forms[-1]))}
    recovered = with_adapter(package, tmp_path / "out", random_branches(package), rows)
    lora = export_lora_gguf(recovered, source, tmp_path / "lora.gguf")
    model = build(plan, tmp_path / "gguf", target="gguf") / "model.gguf"

    plain = ask_llama(model, tmp_path, IDS).logits
    found = ask_llama(model, tmp_path, IDS, lora=lora).logits
    with Session.open(recovered, context_tokens=64) as session:
        expected = session.logits(IDS)
    assert np.abs(plain - expected).max() > 0.1, "the adapter must matter"
    assert np.abs(found - expected).max() < 1e-3


def test_what_the_file_says(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen3_moe")
    checkpoint = Checkpoint(source)
    plan = hand_plan(checkpoint, [["q8_0"] * 8] * 2)
    package = build(plan, tmp_path / "package")
    rows = {1: other_rows(checkpoint, 1, list(range(8)))}
    recovered = with_adapter(package, tmp_path / "out", random_branches(package, rank=4), rows)
    header = read_gguf_header(export_lora_gguf(recovered, source, tmp_path / "lora.gguf"))
    shapes = {tensor.name: tuple(tensor.shape) for tensor in header.tensors}
    assert shapes == {
        "blk.0.attn_output.weight.lora_a": (4, 128),
        "blk.0.attn_output.weight.lora_b": (64, 4),
        "blk.1.attn_output.weight.lora_a": (4, 128),
        "blk.1.attn_output.weight.lora_b": (64, 4),
        "blk.1.ffn_gate_inp.weight.lora_a": (8, 64),
        "blk.1.ffn_gate_inp.weight.lora_b": (8, 8),
    }
    assert header.metadata["general.type"] == "adapter"
    assert header.metadata["general.architecture"] == "qwen3moe"
    assert header.metadata["adapter.type"] == "lora"
    assert header.metadata["adapter.lora.alpha"] == 8.0


def _plain(package: Path, source: Path, work: Path) -> None:
    export_lora_gguf(package, source, work / "lora.gguf")


def _other_original(package: Path, source: Path, work: Path) -> None:
    recovered = with_adapter(package, work / "out", random_branches(package))
    export_lora_gguf(recovered, source, work / "lora.gguf")


def _twice(package: Path, source: Path, work: Path) -> None:
    (work / "lora.gguf").write_text("something")
    export_lora_gguf(package, source, work / "lora.gguf")


@pytest.mark.parametrize(
    ("attempt", "family", "original", "message"),
    [
        (_plain, "qwen3_moe", "qwen3_moe", "was not recovered"),
        (_other_original, "qwen3_moe", "olmoe", "was not built from"),
        (_twice, "qwen3_moe", "qwen3_moe", "already exists"),
    ],
)
def test_bad_input_is_named(
    attempt: Callable[[Path, Path, Path], None],
    family: str,
    original: str,
    message: str,
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(family))
    package = build(hand_plan(checkpoint, [["q8_0"] * 8] * 2), tmp_path / "package")
    with pytest.raises(InputError, match=message):
        attempt(package, tiny_checkpoint(original), tmp_path)


def test_an_architecture_that_llama_cpp_lacks_is_refused(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("phimoe")
    package = build(hand_plan(Checkpoint(source), [["q8_0"] * 8] * 2), tmp_path / "package")
    with pytest.raises(TargetError, match="gguf"):
        export_lora_gguf(package, source, tmp_path / "lora.gguf")
