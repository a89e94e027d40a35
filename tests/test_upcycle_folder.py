"""Dense model -> MoE folder: before any training every engine computes what the dense model does.

Routed experts are the dense feed-forward layer with a down_proj of zeros, so they add nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from float32_gguf import float32_gguf
from gguf_files import add
from hand_plan import edit_config, hand_plan
from llama_worker import ask_llama
from tiny_models import make_tiny_dense
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.staging import build_folder
from edge_moe.converters.upcycle.dense_model import EMBEDDING, HEAD, DenseModel, open_dense
from edge_moe.converters.upcycle.stored_tensor import from_values
from edge_moe.converters.upcycle.target import MoeLayer, MoeShape, choose_target
from edge_moe.converters.upcycle.write_moe import write_moe
from edge_moe.errors import CheckpointError, EdgeMoeError, InputError, SpecError
from edge_moe.runtime.session import Session

IDS = [(7 * i * i + 3 * i) % 250 + 1 for i in range(40)]
FloatArray = npt.NDArray[np.float32]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "qwen2_moe", {}),
    "llama tied": ("llama", "qwen2_moe", {"tie_word_embeddings": True}),
    "llama float16": ("llama", "qwen2_moe", {"dtype": "float16"}),
    "llama wide heads": ("llama", "glm4_moe", {"head_dim": 32}),
    "mistral": ("mistral", "qwen2_moe", {"sliding_window": None}),
    "qwen2": ("qwen2", "qwen2_moe", {}),
    "qwen3": ("qwen3", "glm4_moe", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 biases": ("qwen3", "glm4_moe", {"head_dim": 32, "attention_bias": False}),
}
DenseFolder = Callable[[str], Path]


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> DenseFolder:
    @cache
    def make(case: str) -> Path:
        model_type, _, config = CASES[case]
        return make_tiny_dense(tmp_path_factory.mktemp("dense"), model_type, **config)

    return make


def untrained(dense: DenseModel, layer_id: int, num_experts: int) -> MoeLayer:
    """The feed-forward layer as shared expert, and as every routed one with nothing at its end."""
    gate, up, down = dense.ffn(layer_id)
    zeros = from_values("", dense.dtype, np.zeros(down.shape, np.float32))
    rows = np.random.default_rng(layer_id).normal(size=(num_experts, dense.config.hidden_size))
    router = from_values("", dense.dtype, rows.astype(np.float32))
    return MoeLayer(router, (gate, up, down), [(gate, up, zeros)] * num_experts)


def write_untrained(source: Path, output: Path, **options: Any) -> Path:
    dense = open_dense(source)
    width = dense.config.ffn_width
    shape = MoeShape(num_experts=4, top_k=1, expert_width=width, shared_width=width)
    layers = [untrained(dense, layer, 4) for layer in range(dense.config.num_layers)]
    with build_folder(output, "test") as work:
        write_moe(dense, choose_target(dense.config), shape, layers, work, **options)
    return output


def logits(folder: Path, ids: list[int] = IDS) -> FloatArray:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: FloatArray = model(torch.tensor([ids])).logits[0].numpy()
    return found


def exact_form(folder: Path) -> str:
    spec = Checkpoint(folder).spec
    return {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[spec.dtype]


@pytest.mark.parametrize("case", CASES)
def test_an_untrained_moe_is_the_dense_model_in_transformers(
    case: str, dense_folder: DenseFolder, tmp_path: Path
) -> None:
    source = dense_folder(case)
    output = write_untrained(source, tmp_path / "moe")
    spec = Checkpoint(output).spec
    assert spec.model_type == CASES[case][1]
    assert (spec.num_experts, spec.top_k, spec.num_shared_experts) == (4, 1, 1)
    assert not spec.tie_word_embeddings
    np.testing.assert_array_equal(logits(output), logits(source))
    text = "Grüße, naïve café 42"
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (source, output))
    assert old.encode(text) == new.encode(text)


@pytest.mark.parametrize("case", ["llama tied", "llama float16", "qwen2", "qwen3"])
def test_the_same_in_the_native_engine(
    case: str, dense_folder: DenseFolder, tmp_path: Path
) -> None:
    source = dense_folder(case)
    output = write_untrained(source, tmp_path / "moe")
    checkpoint = Checkpoint(output)
    forms = [[exact_form(output)] * 4 for _ in checkpoint.spec.moe_layer_ids]
    package = build(hand_plan(checkpoint, forms), tmp_path / "package")
    with Session.open(package) as session:
        found = session.logits(IDS)
    np.testing.assert_allclose(found, logits(source), rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", ["llama tied", "llama float16", "mistral", "qwen2", "qwen3"])
def test_the_same_in_llama_cpp(case: str, dense_folder: DenseFolder, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    source = dense_folder(case)
    file = float32_gguf(write_untrained(source, tmp_path / "moe"), tmp_path / "moe.gguf")
    found = ask_llama(file, tmp_path, IDS).logits
    np.testing.assert_allclose(found, logits(source), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["llama tied", "qwen3"])
def test_a_tied_moe_goes_through_the_exporter_too(
    case: str, dense_folder: DenseFolder, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    source = dense_folder(case)
    output = write_untrained(source, tmp_path / "moe", keep_tied=True)
    assert Checkpoint(output).spec.tie_word_embeddings
    np.testing.assert_array_equal(logits(output), logits(source))
    found = ask_llama(float32_gguf(output, tmp_path / "moe.gguf"), tmp_path, IDS).logits
    np.testing.assert_allclose(found, logits(source), rtol=0, atol=1e-4)


def test_scaled_positions_are_taken_over(tmp_path: Path) -> None:
    source = make_tiny_dense(tmp_path / "dense", "llama", rope_parameters=LLAMA3_ROPE)
    output = write_untrained(source, tmp_path / "moe")
    long = [(3 * i * i + i) % 250 for i in range(200)]
    np.testing.assert_array_equal(logits(output, long), logits(source, long))


def test_shards_and_index(dense_folder: DenseFolder, tmp_path: Path) -> None:
    source = dense_folder("qwen2")
    output = write_untrained(source, tmp_path / "moe", shard_bytes=100_000)
    assert len(list(output.glob("model-*.safetensors"))) > 1
    np.testing.assert_array_equal(logits(output), logits(source))


def dense_gguf(
    source: Path,
    output: Path,
    arch: str,
    type_name: str,
    *,
    outer_type: str | None = None,
    keys: Mapping[str, int | float | str] | None = None,
) -> Path:
    """A GGUF of a dense checkpoint, by the `gguf` package: matrices in one type, vectors in F32.

    Embedding and output are in `outer_type`; `keys` are the architecture's, more or other ones.
    """
    import gguf

    from edge_moe.converters.gguf_metadata import add_vocabulary
    from edge_moe.converters.gguf_tokenizer import read_vocabulary

    dense = open_dense(source)
    config = dense.config
    writer = gguf.GGUFWriter(output, arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_rope_freq_base(config.rope["rope_theta"])
    add_key: dict[type, Any] = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in {"rope.dimension_count": config.head_width, **(keys or {})}.items():
        add_key[type(value)](f"{arch}.{key}", value)
    writer.add_layer_norm_rms_eps(config.carried["rms_norm_eps"])
    add_vocabulary(writer, read_vocabulary(source, config.vocab_size))
    for name, tensor in dense.tensors.items():
        values = tensor.read()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            halves = values.reshape(-1, 2, config.head_width // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        kind = (outer_type if name in (EMBEDDING, HEAD) else None) or type_name
        add(writer, _gguf_name(name), values, kind if values.ndim == 2 else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


def _gguf_name(name: str) -> str:
    import gguf

    kind = gguf.MODEL_ARCH.QWEN3
    table = gguf.get_tensor_name_map(kind, 8)
    found = table.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None
    return str(found)


@pytest.mark.parametrize(
    ("case", "arch"), [("llama tied", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
@pytest.mark.parametrize("type_name", ["F32", "Q8_0"])
def test_a_gguf_file_is_a_dense_model_too(
    case: str, arch: str, type_name: str, demo_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model_type, _, config = CASES[case]
    source = make_tiny_dense(tmp_path / "dense", model_type, **{**config, "vocab_size": 4096})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_model / name, source / name)
    file = dense_gguf(source, tmp_path / "dense.gguf", arch, type_name)
    output = write_untrained(file, tmp_path / "moe")
    wanted = ask_llama(file, tmp_path, IDS).logits
    error = np.linalg.norm(logits(output) - wanted) / np.linalg.norm(wanted)
    # with packed weights llama.cpp rounds activations to 8 bits
    assert error < (1e-5 if type_name == "F32" else 0.03)
    text = "Grüße, naïve café 42"
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (source, output))
    assert old.encode(text) == new.encode(text)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope.scale_linear": 4.0}, r"\(llama\.rope\.scale_linear is 4\).*Hugging Face folder"),
        ({"rope.scaling.factor": 0.5}, r"\(llama\.rope\.scaling\.factor is 0\.5\)"),
        ({"rope.scaling.attn_factor": 2.0}, r"\(llama\.rope\.scaling\.attn_factor is 2\)"),
        ({"rope.scaling.type": "none", "rope.scaling.attn_factor": 2.0}, "attn_factor is 2"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, r"scaled \(yarn\)"),
        ({"rope.dimension_count": 8}, "dimension_count is 8 of heads 16 wide.*give a model that"),
    ],
)
def test_positions_that_a_gguf_file_turns_otherwise_are_refused(
    keys: dict[str, int | float | str], message: str, dense_folder: DenseFolder, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    file = dense_gguf(dense_folder("llama"), tmp_path / "a.gguf", "llama", "F32", keys=keys)
    with pytest.raises(InputError, match=message):
        open_dense(file)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope.scale_linear": 1.0, "rope.scaling.factor": 0.0},
        {"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0, "rope.scaling.type": "none"},
    ],
)
def test_factors_that_stretch_nothing_are_no_scaling(
    keys: dict[str, int | float | str], dense_folder: DenseFolder, tmp_path: Path
) -> None:
    """llama.cpp takes 0 for none, and no factor where the type is none."""
    pytest.importorskip("gguf")
    file = dense_gguf(dense_folder("llama"), tmp_path / "a.gguf", "llama", "F32", keys=keys)
    assert open_dense(file).config.rope["rope_type"] == "default"


def edited(source: Path, output: Path, **values: Any) -> Path:
    shutil.copytree(source, output)
    edit_config(output, **values)
    return output


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 8}, "mixture of experts already"),
        ({"num_experts": 8}, "mixture of experts already"),
        ({"model_type": "gemma2"}, "cannot be upcycled"),
        ({"model_type": ""}, "cannot be upcycled"),
        ({"quantization_config": {"quant_method": "fp8"}}, "16-bit"),
        ({"hidden_act": "gelu"}, "SwiGLU"),
        ({"mlp_bias": True}, "no biases"),
        ({"model_type": "mistral", "sliding_window": 128}, '"max_position_embeddings" to 128'),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_hidden_layers": 3}, "is missing"),
        ({"intermediate_size": 65}, "config.json implies"),
        ({"num_hidden_layers": 1}, "no tensor of a plain dense model"),
        ({"num_hidden_layers": "two"}, "refuses"),
    ],
)
def test_what_cannot_be_upcycled_says_why(
    values: dict[str, Any], message: str, dense_folder: DenseFolder, tmp_path: Path
) -> None:
    folder = edited(dense_folder("llama"), tmp_path / "dense", **values)
    with pytest.raises((InputError, CheckpointError, SpecError), match=message):
        open_dense(folder)


def test_a_bias_without_a_place_is_refused(tmp_path: Path) -> None:
    source = make_tiny_dense(tmp_path / "dense", "llama", attention_bias=True)
    with pytest.raises(InputError, match=r"o_proj\.bias.*give a model without it"):
        open_dense(source)


def test_a_mixture_of_experts_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from gguf_files import write_moe as write_moe_gguf

    with pytest.raises(InputError, match="mixture of experts already"):
        open_dense(write_moe_gguf(tmp_path / "moe.gguf"))


def test_glm_states_the_shared_width_as_a_multiple(
    dense_folder: DenseFolder, tmp_path: Path
) -> None:
    dense = open_dense(dense_folder("qwen3"))
    target = choose_target(dense.config)
    with pytest.raises(InputError, match="multiple"):
        target.check(MoeShape(num_experts=4, top_k=1, expert_width=48, shared_width=64))
    with pytest.raises(EdgeMoeError, match="at least 2"):
        target.check(MoeShape(num_experts=1, top_k=1, expert_width=64, shared_width=64))
    with pytest.raises(EdgeMoeError, match="top_k is 5 of 4"):
        MoeShape(num_experts=4, top_k=5, expert_width=64, shared_width=64)


def test_the_config_is_plain(dense_folder: DenseFolder, tmp_path: Path) -> None:
    output = write_untrained(dense_folder("llama"), tmp_path / "moe")
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["Qwen2MoeForCausalLM"]
    assert config["norm_topk_prob"] is False
    assert config["qkv_bias"] is False
