"""FP8 and MXFP4 checkpoints: values by hand, against transformers, and all the way through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyCheckpoint
from hand_plan import hand_plan, uniform_forms
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.onnx import data_files
from edge_moe.converters.transform import transform
from edge_moe.errors import CheckpointError, InputError, SpecError
from edge_moe.inspect import inspect_model
from edge_moe.packed_tensors import _E4M3, to_bfloat16
from edge_moe.runtime.onnx_session import OnnxSession
from edge_moe.runtime.session import Session

TOKENS = [(7 * i * i + 3 * i) % 320 for i in range(40)]
BLOCK = 32
PARTS = ("blocks", "scales")
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) in blocks of `BLOCK`, whose last ones may be smaller."""
    rows, columns = matrix.shape
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            scales[i, j] = matrix[part].abs().max() / 448
            codes[part] = (matrix[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def mxfp4(stack: Tensor) -> tuple[Tensor, Tensor]:
    """[E, rows, columns] -> (blocks [E, rows, columns / 32, 16], scales): nearest values."""
    groups = stack.view(*stack.shape[:2], -1, 32)
    exponents = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=1e-30))) - 2
    scaled = groups / 2 ** exponents[..., None]
    codes = (scaled.abs()[..., None] - _FP4).abs().argmin(-1)
    codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
    return codes[..., 0::2] + 16 * codes[..., 1::2], (exponents + 127).to(torch.uint8)


def repacked(
    source: Path,
    output: Path,
    settings: dict[str, Any],
    pack: Callable[[str, Tensor], dict[str, Tensor]],
) -> Path:
    """A copy of the checkpoint with some tensors packed, and config.json saying so."""
    shutil.copytree(source, output)
    tensors = load_file(source / "model.safetensors")
    packed = {new: value for name, old in tensors.items() for new, value in pack(name, old).items()}
    save_file(packed, output / "model.safetensors", metadata={"format": "pt"})
    path = output / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": settings}
    path.write_text(json.dumps(config))
    return output


def make_fp8(source: Path, output: Path) -> Path:
    settings = {
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
    }

    def pack(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not name.endswith("_proj.weight"):
            return {name: tensor}
        codes, scales = fp8(tensor.float())
        return {name: codes, f"{name}_scale_inv": scales}

    return repacked(source, output, settings, pack)


def make_mxfp4(source: Path, output: Path) -> Path:
    def pack(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: tensor}
        blocks, scales = mxfp4(tensor.float().transpose(1, 2).contiguous())
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    return repacked(source, output, {"quant_method": "mxfp4"}, pack)


def logits(folder: Path) -> np.ndarray[Any, Any]:
    with Session.open(folder, context_tokens=64) as session:
        return session.logits(TOKENS)


def test_every_value_of_fp8() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    np.testing.assert_array_equal(_E4M3, codes.float().numpy())


@given(st.lists(st.floats(width=32, allow_infinity=False), min_size=1, max_size=20))
def test_rounding_is_that_of_torch(values: list[float]) -> None:
    numbers = np.array(values, np.float32)
    np.testing.assert_array_equal(
        to_bfloat16(numbers), torch.from_numpy(numbers).bfloat16().float().numpy()
    )


def test_fp8_by_hand(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = make_fp8(tiny_checkpoint("qwen2_moe"), tmp_path / "fp8")
    checkpoint = Checkpoint(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in (
            "model.layers.1.mlp.experts.3.down_proj.weight",
            "model.layers.0.mlp.shared_expert.up_proj.weight",  # 96 x 64: blocks that end early
        ):
            codes, scales = file.get_tensor(name).float(), file.get_tensor(f"{name}_scale_inv")
            factors = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            expected = (codes * factors[: codes.shape[0], : codes.shape[1]]).bfloat16().float()
            np.testing.assert_array_equal(checkpoint.read(name), expected.numpy())


def test_mxfp4_is_what_transformers_reads(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = make_mxfp4(tiny_checkpoint("gpt_oss"), tmp_path / "mxfp4")
    with safe_open(folder / "model.safetensors", "pt") as file:
        gate_up, theirs = (
            convert_moe_packed_tensors(
                *(file.get_tensor(f"model.layers.1.mlp.experts.{name}_{part}") for part in PARTS)
            )[5]
            .float()
            .T.numpy()
            for name in ("gate_up_proj", "down_proj")
        )
    gate, up, down = Checkpoint(folder).expert(1, 5)
    np.testing.assert_array_equal(gate, gate_up[::2])
    np.testing.assert_array_equal(up, gate_up[1::2])
    np.testing.assert_array_equal(down, theirs)


@pytest.mark.parametrize(
    ("family", "make"),
    [("qwen3_moe", make_fp8), ("deepseek_v3", make_fp8), ("gpt_oss", make_mxfp4)],
)
def test_packed_checkpoints_go_all_the_way(
    family: str,
    make: Callable[[Path, Path], Path],
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
) -> None:
    """A pruned package computes what the pruned, still packed checkpoint does."""
    folder = make(tiny_checkpoint(family), tmp_path / "packed")
    checkpoint = Checkpoint(folder)
    assert checkpoint.spec.dtype == "bfloat16"
    found = inspect_model(str(folder))
    file_bytes = (folder / "model.safetensors").stat().st_size
    assert 0 < file_bytes - sum(part.num_bytes for part in found.components) < 64 * 2**10
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 4))
    native = build(plan, tmp_path / "native", model=folder)
    hf = build(hand_plan(checkpoint, uniform_forms(checkpoint, 4), "hf"), tmp_path / "hf")
    smaller = Checkpoint(hf)
    assert smaller.has_packed_experts and smaller.spec.num_experts == 4
    np.testing.assert_allclose(logits(native), logits(hf), atol=1e-4)
    assert np.abs(logits(native) - logits(folder)).max() > 0.01
    whole = build(hand_plan(checkpoint, uniform_forms(checkpoint, 8)), tmp_path / "whole")
    np.testing.assert_allclose(logits(whole), logits(folder), atol=1e-4)


@pytest.mark.parametrize(("family", "make"), [("qwen3_moe", make_fp8), ("gpt_oss", make_mxfp4)])
def test_onnx_of_packed_experts_is_the_native_package(
    family: str,
    make: Callable[[Path, Path], Path],
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    checkpoint = Checkpoint(make(tiny_checkpoint(family), tmp_path / "packed"))
    native = build(hand_plan(checkpoint, uniform_forms(checkpoint, 4)), tmp_path / "native")
    onnx = hand_plan(checkpoint, uniform_forms(checkpoint, 4, "f32"), "onnx")
    with OnnxSession.open(build(onnx, tmp_path / "onnx"), context_tokens=64) as session:
        np.testing.assert_allclose(session.logits(TOKENS), logits(native), atol=1e-4)


@pytest.mark.parametrize("chunk_bytes", [2**21, 256])
def test_onnx_takes_packed_tensors_of_any_size(
    chunk_bytes: int,
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data_files, "_CHUNK_BYTES", chunk_bytes)
    checkpoint = Checkpoint(make_fp8(tiny_checkpoint("qwen3_moe"), tmp_path / "fp8"))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        written = b"".join(data_files.float32_chunks([checkpoint.tensors[name]])())
        assert written == checkpoint.read(name).tobytes()


def test_packed_files_that_lie_are_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = make_fp8(tiny_checkpoint("qwen3_moe"), tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    scales = tensors.pop(f"{name}_scale_inv")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no scales"):
        Checkpoint(folder)
    save_file(tensors | {f"{name}_scale_inv": scales[:1].clone()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="needs scales of shape"):
        Checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError, match=r"already quantised \(awq\)"):
        Checkpoint(folder)


def test_transforms_refuse_packed_checkpoints(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = make_fp8(tiny_checkpoint("qwen3_moe"), tmp_path / "fp8")
    with pytest.raises(InputError, match="is stored in 8 or 4 bits"):
        transform(folder, ["code"], tmp_path / "out", "prune", num_experts=4)
