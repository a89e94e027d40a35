"""Safetensors headers and configs that lie: refused in one line, with a remedy."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import FAMILY_NAMES, TinyCheckpoint
from hand_plan import edit_config
from safetensors.torch import load_file, save_file

from edge_moe.checkpoint import Checkpoint
from edge_moe.config_reader import read_config
from edge_moe.dense_shapes import dense_shapes
from edge_moe.errors import CheckpointError, InputError, SpecError
from edge_moe.families import FAMILIES
from edge_moe.safetensors_header import read_header
from edge_moe.spec import ModelSpec


def write_file(path: Path, header: object, num_bytes: int = 16) -> Path:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_bytes))
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(shape=[2**70])}, "needs 4722366482869645213696 bytes"),
        ({"a": entry(shape=[2**32, 2**32], offsets=[0, 0])}, "the header gives it 0"),
        ({"a": entry(offsets=[0, float("inf")])}, "'a' is malformed"),
        ({"a": entry(shape=[2.0])}, "'a' is malformed"),
        ({"a": entry(shape=[True])}, "'a' is malformed"),
        ({"a": entry(dtype=["F32"])}, "'a' is malformed"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, "'b' lies inside 'a'"),
        ({"a": entry(), "b": entry()}, "lies inside"),
        ({"__metadata__": [1]}, "__metadata__ is not a table of texts"),
        ({"__metadata__": {"format": 1}}, "__metadata__ is not a table of texts"),
        ("[" * 100_000, "has no readable header"),
        ("[1]", "is not a JSON object"),
    ],
)
def test_headers_that_contradict_themselves(header: object, message: str, tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", header)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "download" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_may_touch_and_may_be_empty(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry(offsets=[8, 16]),
        "none": entry(shape=[0], offsets=[8, 8]),
        "a": entry(),
    }
    tensors, metadata = read_header(write_file(tmp_path / "x.safetensors", header))
    assert list(tensors) == ["b", "none", "a"] and metadata == {"format": "pt"}


@pytest.fixture
def source(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint("qwen3_moe"), tmp_path / "source")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 5000}, r"embed_tokens.weight' has shape \[320, 64\].* \[5000, 64\]"),
        ({"num_attention_heads": 8}, r"q_proj.weight' has shape \[128, 64\].* \[256, 64\]"),
        ({"num_key_value_heads": 4}, r"k_proj.weight' has shape \[64, 64\].* \[128, 64\]"),
        ({"mlp_only_layers": [0]}, "first 'model.layers.0.mlp.gate_proj.weight'"),
        ({"num_hidden_layers": 3}, "tensors that config.json promises are missing"),
    ],
)
def test_configs_that_the_headers_deny(
    change: dict[str, object], message: str, source: Path
) -> None:
    edit_config(source, **change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(source)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.self_attn.q_proj.weight", r"first 'model.layers.1.self_attn.q_proj"),
        ("model.norm.weight", "first 'model.norm.weight'"),
        ("model.layers.0.mlp.gate.weight", "first 'model.layers.0.mlp.gate.weight'"),
    ],
)
def test_a_dense_tensor_that_is_missing(name: str, message: str, source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors[name]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(source)


def test_a_router_of_another_width_names_the_hidden_size(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.gate.weight"
    tensors[name] = tensors[name][:, :32].contiguous()
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"has shape \[8, 32\], config.json implies \[8, 64\]"
    ):
        Checkpoint(source)


def test_a_dtype_that_cannot_be_read(source: Path) -> None:
    path = source / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"]["dtype"] = "FOO"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is FOO; edge-moe reads BF16"):
        Checkpoint(source)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_promised_shapes_are_those_of_transformers(
    family: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(family))
    config = read_config(checkpoint.folder / "config.json")
    promised = dense_shapes(checkpoint.spec, config, "config.json")
    found = {info.name: info.shape for info in checkpoint.dense_tensors}
    biases = {name for name in found if name.endswith(("bias", ".sinks"))}
    assert promised == {name: shape for name, shape in found.items() if name not in biases}


def test_the_latent_queries_of_deepseek_are_promised(tiny_checkpoint: TinyCheckpoint) -> None:
    spec = Checkpoint(tiny_checkpoint("deepseek_v3")).spec
    config = read_config(tiny_checkpoint("deepseek_v3") / "config.json") | {"q_lora_rank": 24}
    shapes = dense_shapes(spec, config, "config.json")
    assert shapes["model.layers.0.self_attn.q_a_proj.weight"] == (24, 64)
    assert shapes["model.layers.0.self_attn.q_a_layernorm.weight"] == (24,)
    assert shapes["model.layers.0.self_attn.q_b_proj.weight"] == (4 * 48, 24)
    assert "model.layers.0.self_attn.q_proj.weight" not in shapes


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(family)
    for key, value in FAMILIES[family].config_defaults.items():
        assert getattr(theirs, key) == value, key


def test_keys_that_are_left_out_get_the_defaults_of_the_family() -> None:
    common = {
        "num_hidden_layers": 8, "num_experts_per_tok": 2, "hidden_size": 64, "vocab_size": 10,
        "num_attention_heads": 16,
    }  # fmt: skip
    deepseek = ModelSpec.from_config(
        {**common, "model_type": "deepseek_v3", "n_routed_experts": 16, "moe_intermediate_size": 8}
    )
    assert (deepseek.router.num_groups, deepseek.router.top_groups) == (8, 4)
    assert deepseek.router.scale == 2.5 and deepseek.router.renormalises
    assert deepseek.moe_layer_ids == (3, 4, 5, 6, 7)
    assert (deepseek.kv_key_width, deepseek.kv_value_width) == (512, 64)
    assert deepseek.query_width == 16 * (128 + 64)
    mixtral = ModelSpec.from_config(
        {**common, "model_type": "mixtral", "num_local_experts": 8, "intermediate_size": 8}
    )
    assert mixtral.kv_key_width == 8 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": None}, "the key num_experts_per_tok has no value: add it"),
        ({"num_experts_per_tok": 99}, "there are 8 experts: correct the file"),
        ({"decoder_sparse_step": "2"}, "decoder_sparse_step is '2', expected an integer"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is 3, expected a list"),
        ({"routed_scaling_factor": "x"}, "routed_scaling_factor is 'x', expected a number"),
        ({"model_type": "llama"}, "give a model of one of these"),
    ],
)
def test_config_values_that_mean_nothing(
    change: dict[str, object], message: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    config = read_config(tiny_checkpoint("qwen3_moe") / "config.json") | change
    with pytest.raises(SpecError, match=message):
        ModelSpec.from_config(config)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_no_broken_download(name: str, source: Path) -> None:
    real_open = Path.open

    def refuse(path: Path, *rest: Any, **options: Any) -> Any:
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *rest, **options)

    with (
        mock.patch.object(Path, "open", refuse),
        pytest.raises(
            (SpecError, CheckpointError, InputError),
            match=f"{name} cannot be read: Permission denied; change its permissions",
        ),
    ):
        Checkpoint(source)
