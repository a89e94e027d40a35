"""What the families' own files say and transformers no longer saves; and what no file may say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from hand_plan import hand_plan
from safetensors.torch import load_file, save_file
from torch import Tensor

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.layer_stream import LayerStream
from edge_moe.errors import CheckpointError, EdgeMoeError, SpecError
from edge_moe.minimal_model import minimal_config
from edge_moe.plan import Plan
from edge_moe.runtime.session import Session
from edge_moe.spec import ModelSpec

Edit = Callable[[dict[str, Tensor]], None]


def edited(source: Path, output: Path, edit: Edit, **values: Any) -> Path:
    """A copy of a checkpoint with other tensors and config.json values."""
    shutil.copytree(source, output)
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config | values))
    return output


def spec(family: str, **values: Any) -> ModelSpec:
    config = minimal_config(family) | {"model_type": family} | values
    return ModelSpec.from_config({key: value for key, value in config.items() if value != "GONE"})


@pytest.mark.parametrize(
    ("family", "drafts"),
    [
        ("ernie4_5_moe", ("model.mtp_emb_norm.0.weight", "model.mtp_block.0.mlp.up_proj.weight")),
        ("qwen3_next", ("mtp.fc.weight", "mtp.layers.0.mlp.gate.weight")),
        ("glm4_moe", ("model.layers.3.mlp.gate.weight", "model.layers.3.eh_proj.weight")),
    ],
)
def test_multi_token_prediction_is_left_out(
    family: str, drafts: tuple[str, ...], tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: torch.ones(8, 64) for name in drafts})

    plain = Checkpoint(tiny_checkpoint(family))
    found = Checkpoint(edited(plain.folder, tmp_path / "with", add))
    assert found.unused_tensors == set(drafts)
    assert not found.other_tensors
    names = {info.name for info in found.dense_tensors}
    assert names == {info.name for info in plain.dense_tensors}
    assert found.total_parameters == plain.total_parameters


def test_rotary_tables_of_old_files_are_not_loaded(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    source = tiny_checkpoint("mixtral")
    found = Checkpoint(
        edited(source, tmp_path / "old", lambda tensors: tensors.update({name: torch.ones(16)}))
    )
    assert name not in {info.name for info in found.dense_tensors}


def test_other_parts_may_hold_integers(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    name = "vision.position_ids"
    source = tiny_checkpoint("qwen3_moe")
    found = Checkpoint(
        edited(source, tmp_path / "ids", lambda tensors: tensors.update({name: torch.arange(4)}))
    )
    assert [info.name for info in found.other_tensors] == [name]


def test_lfm2_has_its_own_word_for_tied_embeddings() -> None:
    assert spec("lfm2_moe", tie_word_embeddings="GONE").tie_word_embeddings
    assert not spec("lfm2_moe", tie_word_embeddings="GONE", tie_embedding=False).tie_word_embeddings


def test_qwen3_next_may_state_an_interval() -> None:
    found = spec("qwen3_next", layer_types="GONE", full_attention_interval=2)
    assert found.num_state_layers == 2


ROPES = [
    ({"rope_type": "yarn", "rope_theta": 1e4}, r"refuses it: .*rope_parameters.*\{'factor'\}"),
    ("yarn", "refuses it: Validation error for field 'rope_parameters': TypeError: .* 'yarn'"),
    ({"rope_type": "none", "rope_theta": 1e4}, "rope_type is 'none', transformers knows default"),
    (
        {"rope_type": "linear", "rope_theta": 1e4, "factor": "two"},
        "factor of rope_parameters is 'two', expected a number",
    ),
]


@pytest.mark.parametrize(("rope", "message"), ROPES)
def test_rotary_parameters_are_no_problem_of_the_tokenizer(
    rope: Any, message: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen3_moe")
    folder = edited(source, tmp_path / "odd", lambda tensors: None, rope_parameters=rope)
    plan = hand_plan(Checkpoint(folder), [["f32"] * 8] * 2, "onnx")
    for load in (
        lambda: Session.open(folder),
        lambda: LayerStream(Checkpoint(folder), "eager"),
        lambda: export_onnx_to(plan, folder, tmp_path / "onnx"),
    ):
        with pytest.raises(SpecError, match=rf"config\.json: .*{message}.*: correct the file or"):
            load()


def export_onnx_to(plan: Plan, folder: Path, output: Path) -> None:
    pytest.importorskip("onnx")
    build(plan, output, model=folder)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma4_text", "lfm2_moe"])
@pytest.mark.parametrize("layer_types", ["GONE", ["full_attention"]])
def test_layers_without_a_type_are_refused(family: str, layer_types: Any) -> None:
    with pytest.raises(SpecError, match=r"layer_types holds \d entries for \d layers"):
        spec(family, layer_types=layer_types)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**12}, "1000000000000 layers are more than"),
        ({"num_hidden_layers": 9999}, "tensors that config.json promises are missing"),
        ({"num_experts": 10**12, "num_local_experts": 10**12}, "promises are missing"),
        ({"quantization_config": "fp8"}, "expected a table"),
        ({"quantization_config": ["fp8"]}, "expected a table"),
        ({"router_jitter_noise": "high"}, "router_jitter_noise is 'high'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, expected true or false"),
        ({"model_type": "qwen3_next", "layer_types": [{}, {}]}, "a layer of type {}"),
    ],
)
def test_values_that_lie_are_refused(
    values: dict[str, Any], message: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen3_moe")
    with pytest.raises(EdgeMoeError, match=message):
        Checkpoint(edited(source, tmp_path / "lies", lambda tensors: None, **values))


def test_what_transformers_cannot_build_is_refused(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen3_moe")
    folder = edited(source, tmp_path / "odd", lambda tensors: None, hidden_act="nosuch")
    with pytest.raises(SpecError, match="transformers refuses it: 'nosuch'"):
        LayerStream(Checkpoint(folder), "eager")


def test_blocks_of_another_dtype_are_refused(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["x_blocks"] = torch.ones(2, 3, 1, 16, dtype=torch.bfloat16)
        tensors["x_scales"] = torch.ones(2, 3, 1, dtype=torch.uint8)

    settings = {"quant_method": "mxfp4"}
    folder = edited(
        tiny_checkpoint("qwen3_moe"), tmp_path / "mx", add, quantization_config=settings
    )
    with pytest.raises(CheckpointError, match=r"is BF16 \[2, 3, 1, 16\].*do not belong together"):
        Checkpoint(folder)


def test_a_block_wider_than_its_matrix_takes_no_memory(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"

    def pack(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.full((1, 1), 2.0)

    settings = {"quant_method": "fp8", "weight_block_size": [10**12, 10**12]}
    source = tiny_checkpoint("qwen3_moe")
    folder = edited(source, tmp_path / "fp8", pack, quantization_config=settings)
    expected = 2 * load_file(folder / "model.safetensors")[name].float()
    assert torch.equal(torch.from_numpy(Checkpoint(folder).read(name)), expected)
