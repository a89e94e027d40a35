"""A GGUF file as a source: what it says about itself, and experts read from their own bytes."""

from __future__ import annotations

import math
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyCheckpoint
from gguf_files import packed, write_moe
from hand_plan import hand_plan, uniform_forms

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.export_gguf import export_gguf
from edge_moe.converters.slice_packing import SlicePacker
from edge_moe.errors import CheckpointError, EdgeMoeError, SpecError
from edge_moe.formats import FORM_NAMES, get_form
from edge_moe.formats.dequantise import dequantise
from edge_moe.formats.ggml_library import to_float
from edge_moe.formats.ggml_types import GGML_TYPES_BY_NAME
from edge_moe.gguf_arch import GGUF_ARCHS
from edge_moe.gguf_model import GgufModel

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp", reason="needs libggml")


# ---------------------------------------------------------------------------- what it is


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_an_export_says_what_its_checkpoint_says(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(family))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8, "f32"), "gguf")
    model = GgufModel(export_gguf(plan, checkpoint, tmp_path / "model.gguf"))
    found, wanted = model.spec, checkpoint.spec
    assert found.model_type == f"gguf:{family.replace('_', '')}" and found.is_gguf
    for name in (
        *("num_layers", "moe_layer_ids", "num_experts", "top_k", "hidden_size", "expert_width"),
        *("vocab_size", "num_attention_heads", "num_kv_heads", "query_width", "kv_key_width"),
        *("kv_value_width", "max_position_embeddings", "num_shared_experts"),
    ):
        assert getattr(found, name) == getattr(wanted, name), name
    assert found.router.describe() == wanted.router.describe()
    assert model.total_parameters == checkpoint.total_parameters
    for expert_id in (0, 7):
        for mine, theirs in zip(
            model.expert(1, expert_id), checkpoint.expert(1, expert_id), strict=True
        ):
            np.testing.assert_array_equal(mine, theirs)
    assert model.stored_types(0) == ("f32", "f32", "f32")
    expert_bytes = sum(model.expert_bytes(layer) * 8 for layer in wanted.moe_layer_ids)
    tensor_bytes = sum(info.num_bytes for info in model.tensors.values())
    assert model.dense_bytes + expert_bytes == tensor_bytes


ROUTERS: list[tuple[str, dict[str, Any], str]] = [
    ("olmoe", {"expert_weights_norm": True}, "softmax, not renormalised"),
    ("qwen3moe", {"expert_weights_scale": 2.5}, "softmax, renormalised"),
    ("gpt-oss", {}, "softmax, renormalised"),
    ("deepseek2", {"expert_weights_scale": 2.5}, "softmax, not renormalised, scaled by 2.5"),
    (
        "deepseek2",
        {"expert_gating_func": 2, "expert_weights_norm": True},
        "sigmoid, renormalised",
    ),
    (
        "deepseek2",
        {"expert_group_count": 2, "expert_group_used_count": 1},
        "softmax, 1 of 2 groups, not renormalised",
    ),
    ("glm4moe", {}, "sigmoid, not renormalised"),
    ("minimax-m2", {"expert_gating_func": 2}, "sigmoid, renormalised"),
    ("lfm2moe", {"expert_gating_func": 3}, "softmax, renormalised"),
]


@pytest.mark.parametrize(("arch", "keys", "router"), ROUTERS)
def test_the_router_is_llama_cpps(
    arch: str, keys: dict[str, Any], router: str, tmp_path: Path
) -> None:
    path = write_moe(tmp_path / "m.gguf", arch, types=("F32",) * 3, width=32, keys=keys)
    assert GgufModel(path).spec.router.describe() == router


def test_every_architecture_of_the_table_is_one_of_llama_cpp() -> None:
    import llama_cpp

    library = next((Path(llama_cpp.__file__).parent / "lib").glob("libllama.*"))
    names = library.read_bytes().split(b"\0")
    assert {arch.encode() for arch in GGUF_ARCHS} <= set(names)


def test_arrays_over_layers_and_absorbed_attention(tmp_path: Path) -> None:
    keys = {
        "attention.head_count": [4] * 12,
        "attention.head_count_kv": [0, 2] * 6,
        "attention.key_length": 16,
        "attention.value_length": 8,
    }
    path = write_moe(tmp_path / "a.gguf", types=("F32",) * 3, width=32, num_layers=12, keys=keys)
    spec = GgufModel(path).spec
    assert (spec.num_attention_heads, spec.num_kv_heads) == (4, 2)
    assert (spec.kv_key_width, spec.kv_value_width, spec.query_width) == (32, 16, 64)
    assert spec.num_state_layers == 6 and spec.kv_bytes_per_token(2) == 6 * 2 * (32 + 16)
    mla = {
        "attention.head_count_kv": 1,
        "attention.key_length": 40,
        "attention.value_length": 32,
        "attention.key_length_mla": 24,
        "attention.value_length_mla": 16,
        "kv_lora_rank": 32,
    }
    path = write_moe(tmp_path / "m.gguf", "deepseek2", types=("F32",) * 3, width=32, keys=mla)
    spec = GgufModel(path).spec
    assert (spec.kv_key_width, spec.kv_value_width) == (40, 0)


def test_layers_for_multi_token_prediction_are_not_counted(tmp_path: Path) -> None:
    path = write_moe(
        tmp_path / "m.gguf",
        "glm4moe",
        types=("F32",) * 3,
        width=32,
        num_layers=3,
        keys={"nextn_predict_layers": 1},
    )
    model = GgufModel(path)
    assert (model.spec.num_layers, model.spec.moe_layer_ids) == (2, (0, 1))
    assert "blk.2.ffn_down_exps.weight" in model.unused_tensors
    assert any(info.name.startswith("blk.2.") for info in model.per_expert_tensors)


# ---------------------------------------------------------------------------- experts


ANY_TYPES = [
    *("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K"),
    *("Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
]


@pytest.mark.parametrize("type_name", ANY_TYPES)
def test_three_implementations_dequantise_alike(type_name: str) -> None:
    values = np.random.default_rng(1).normal(size=(3, 512)).astype(np.float32)
    raw = packed(values, type_name)
    kind = GGML_TYPES_BY_NAME[type_name]
    mine = dequantise(type_name, raw.tobytes(), values.size)
    by_library = to_float(kind, raw.reshape(-1), values.size)
    by_package = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name]).reshape(-1)
    if type_name.lower() in FORM_NAMES:
        by_form = get_form(type_name.lower()).unpack(raw, 512).reshape(-1)
        np.testing.assert_array_equal(by_form, by_library)
    np.testing.assert_array_equal(mine, by_library)
    np.testing.assert_allclose(by_package, by_library, rtol=1e-6, atol=1e-9)
    assert np.corrcoef(mine, values.reshape(-1))[0, 1] > 0.65


@pytest.mark.parametrize("merged", [False, True])
def test_an_expert_is_its_own_bytes(merged: bool, tmp_path: Path) -> None:
    path = write_moe(tmp_path / "m.gguf", "gemma4", merged=merged, types=("Q4_K", "Q4_K", "Q6_K"))
    model = GgufModel(path)
    whole = {t.name: t for t in gguf.GGUFReader(path).tensors}

    def stack(part: str) -> Any:
        tensor = whole[f"blk.1.ffn_{part}_exps.weight"]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)

    gate, up, down = model.expert(1, 2)
    wanted_gate, wanted_up = (
        np.split(stack("gate_up")[2], 2) if merged else (stack("gate")[2], stack("up")[2])
    )
    np.testing.assert_allclose(gate, wanted_gate, atol=1e-7)
    np.testing.assert_allclose(up, wanted_up, atol=1e-7)
    np.testing.assert_allclose(down, stack("down")[2], atol=1e-7)
    assert model.stored_types(1) == ("q4_k", "q4_k", "q6_k")
    assert model.projection_bytes(1) == (256 * 144, 256 * 144, 256 * 210)
    assert model.expert_bytes(1) == 256 * (144 + 144 + 210)


def test_scales_and_biases(tmp_path: Path) -> None:
    scales = np.array([1.0, 2.0, 3.0, 4.0])
    random = np.random.default_rng(3)
    bias = {p: random.normal(size=(4, 32)) for p in ("gate", "up", "down")}
    tensors = {f"blk.0.ffn_{p}_exps.bias": values for p, values in bias.items()}
    tensors["blk.0.ffn_down_exps.scale"] = scales
    plain = GgufModel(write_moe(tmp_path / "p.gguf", types=("F32",) * 3, width=32))
    path = write_moe(tmp_path / "m.gguf", types=("F32",) * 3, width=32, tensors=tensors)
    model = GgufModel(path)
    np.testing.assert_array_equal(model.expert(0, 2)[2], 3 * plain.expert(0, 2)[2])
    np.testing.assert_array_equal(model.expert(0, 2)[0], plain.expert(0, 2)[0])
    found = model.expert_biases(0, 3)
    assert found is not None and model.expert_biases(1, 3) is None
    for mine, part in zip(found, ("gate", "up", "down"), strict=True):
        np.testing.assert_array_equal(mine, bias[part][3].astype(np.float32))


def test_the_fingerprint_follows_the_bytes_not_the_name(tmp_path: Path) -> None:
    one = write_moe(tmp_path / "one.gguf", types=("F32",) * 3, width=32)
    shutil.copy(one, tmp_path / "two.gguf")
    other = write_moe(tmp_path / "other.gguf", types=("F32",) * 3, width=32, seed=1)
    prints = [GgufModel(p).fingerprint for p in (one, tmp_path / "two.gguf", other)]
    assert prints[0] == prints[1] != prints[2]
    tokenizers = [GgufModel(p).tokenizer_fingerprint for p in (one, other)]
    assert tokenizers[0] == tokenizers[1]


# ---------------------------------------------------------------------------- split sets


def _split(folder: Path, **options: Any) -> list[Path]:
    write_moe(folder / "m.gguf", types=("F32",) * 3, width=32, split_max_tensors=5, **options)
    return sorted(folder.glob("m-*.gguf"))


def test_a_split_model_is_one_model(tmp_path: Path) -> None:
    parts = _split(tmp_path)
    assert [p.name for p in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    whole = GgufModel(write_moe(tmp_path / "whole.gguf", types=("F32",) * 3, width=32))
    model = GgufModel(parts[0])
    assert model.spec == whole.spec and set(model.tensors) == set(whole.tensors)
    assert model.file_bytes == sum(p.stat().st_size for p in parts)
    for mine, theirs in zip(model.expert(1, 3), whole.expert(1, 3), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_bad_split_sets_are_refused(tmp_path: Path) -> None:
    parts = _split(tmp_path)
    with pytest.raises(CheckpointError, match=r"is part 2 of 3: give the first part, .*00001-of"):
        GgufModel(parts[1])
    kept = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003.gguf does not exist: part 2 of 3"):
        GgufModel(parts[0])
    shutil.copy(parts[2], parts[1])
    with pytest.raises(CheckpointError, match=r"part 2 of 3 by its name, but says split.no=2"):
        GgufModel(parts[0])
    shutil.copy(parts[0], parts[1])  # a set that points at itself
    with pytest.raises(CheckpointError, match=r"split.no=0"):
        GgufModel(parts[0])
    parts[1].write_bytes(kept)
    renamed = tmp_path / "renamed.gguf"
    shutil.copy(parts[0], renamed)
    with pytest.raises(CheckpointError, match="give them their original names"):
        GgufModel(renamed)
    wrong = tmp_path / "m-00001-of-00007.gguf"
    shutil.copy(parts[0], wrong)
    with pytest.raises(CheckpointError, match=r"its name says 7 parts, its key split.count says 3"):
        GgufModel(wrong)


def test_parts_of_other_models_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    parts = _split(tmp_path / "a")
    others = _split(tmp_path / "b", num_layers=3)
    content = bytearray(others[1].read_bytes())
    at = content.index(b"split.count") + len(b"split.count") + 4
    content[at : at + 2] = struct.pack("<H", 3)
    parts[1].write_bytes(content)
    with pytest.raises(CheckpointError, match="split.tensors.count=16, the first part says 11"):
        GgufModel(parts[0])
    shutil.copy(parts[2], parts[1])  # says part 3: let it say part 2
    content = bytearray(parts[1].read_bytes())
    at = content.index(b"split.no") + len(b"split.no") + 4
    content[at : at + 2] = struct.pack("<H", 1)
    parts[1].write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is in m-00002-of-00003.gguf too"):
        GgufModel(parts[0])


# ---------------------------------------------------------------------------- refusals


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"arch": "qwen3"}, "architecture 'qwen3' is not supported as a source"),
    ({"arch": "mamba"}, "architecture 'mamba' is not supported"),
    ({"keys": {"expert_count": None}}, "expert_count is None"),
    ({"keys": {"expert_used_count": 9}}, "expert_used_count is 9 but there are 4 experts"),
    ({"keys": {"expert_count": 5}}, r"has shape \[4, 32, 32\], the metadata implies \[5, 32, 32\]"),
    ({"keys": {"embedding_length": 64}}, r"the metadata implies \[4, 32, 64\]"),
    ({"keys": {"block_count": 0}}, "block_count is 0"),
    (
        {"keys": {"block_count": 2**32 - 1}},
        "block_count is 4294967295, expected a number of layers",
    ),
    ({"keys": {"context_length": None}}, "context_length is None"),
    ({"keys": {"attention.head_count": [4, -1]}}, "attention.head_count is -1"),
    ({"keys": {"expert_group_count": 3}}, "do not divide into expert_group_count=3"),
    ({"arch": "dots1"}, "expert_gating_func is None, expected 1"),
    ({"arch": "glm4moe", "keys": {"expert_gating_func": 4}}, "expert_gating_func is 4"),
    ({"tensors": {"blk.0.exp_probs_b_vl": np.ones(4)}}, "may hold one row per expert"),
    ({"tensors": {"blk.0.ffn_gate.0.weight": np.ones((32, 32))}}, "stored expert by expert"),
    ({"tensors": {"blk.0.exp_probs_b.bias": np.ones(3)}}, r"has shape \[3\], but there are 4"),
    ({"tensors": {"blk.2.ffn_up_exps.weight": np.ones((4, 8, 8))}}, "stores its experts as up"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_is_not_understood_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_moe(tmp_path / "m.gguf", types=("F32",) * 3, width=32, **options)
    with pytest.raises((CheckpointError, SpecError), match=message) as caught:
        GgufModel(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_rows_that_are_not_whole_blocks_cannot_be_sliced(tmp_path: Path) -> None:
    path = write_moe(tmp_path / "m.gguf", types=("F32",) * 3, width=32)
    content = bytearray(path.read_bytes())
    name = b"blk.0.ffn_gate_inp.weight"
    at = content.index(name) + len(name)
    # [E=4, H=32] F32 said to be Q4_K [4, 32]: rows of 32 are no multiple of 256
    content[at + 4 + 16 : at + 4 + 20] = struct.pack("<I", 12)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="rows of 32, no multiple of Q4_K's 256"):
        GgufModel(path)


def test_a_quantised_row_per_expert_cannot_be_sliced(tmp_path: Path) -> None:
    path = write_moe(
        *(tmp_path / "m.gguf", "glm4moe"),
        types=("F32",) * 3,
        width=32,
        num_experts=32,
        tensors={"blk.0.exp_probs_b.bias": np.ones(32)},
        tensor_types={"blk.0.exp_probs_b.bias": "Q8_0"},
    )
    with pytest.raises(CheckpointError, match=r"no whole number of blocks of 32: store .* as F32"):
        GgufModel(path)


def test_nan_is_noticed(tmp_path: Path) -> None:
    path = write_moe(tmp_path / "m.gguf", types=("F32",) * 3, width=32)
    model = GgufModel(path)
    _, start, _ = model.expert_ranges(0, 1)[1]
    content = bytearray(path.read_bytes())
    content[start : start + 4] = struct.pack("<f", math.nan)
    path.write_bytes(content)
    model.expert(0, 0)
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        model.expert(0, 1)
    up, packer = model.tensors["blk.0.ffn_up_exps.weight"], SlicePacker("nearest")
    assert packer.packed(up, 0, "q8_0").size
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        packer.packed(up, 1, "q8_0")


def test_every_truncation_is_one_error(tmp_path: Path) -> None:
    path = write_moe(tmp_path / "m.gguf", types=("F32",) * 3, width=32)
    content = path.read_bytes()
    header_bytes = GgufModel(path).header.data_start
    for length in [*range(0, header_bytes, 41), header_bytes, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(EdgeMoeError):
            GgufModel(path)
