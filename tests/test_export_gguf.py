"""GGUF export: llama.cpp computes what transformers computes, and splits text as it does.

Logits of quantised experts are compared with transformers running the unpacked weights. llama.cpp
also rounds the activations that meet a quantised matrix (to 8 bits), so those agree loosely only,
and only where every expert is chosen: on random weights a rounded activation flips the top-k choice
and with it the logits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import TinyCheckpoint, make_tiny_checkpoint
from hand_plan import edit_config, fused_copy, hand_plan, uniform_forms
from llama_worker import ask_llama
from safetensors.numpy import save_file

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters import gguf_writer
from edge_moe.converters.export_gguf import export_gguf
from edge_moe.converters.gguf_tokenizer import read_vocabulary
from edge_moe.errors import CheckpointError, DiskSpaceError, MissingExtraError, TargetError
from edge_moe.formats import DROP, get_form, pack_expert, unpack_expert
from edge_moe.gguf_header import GgufArray, GgufHeader, read_gguf_header
from edge_moe.plan import Plan

gguf = pytest.importorskip("gguf")

IDS = [int(i) for i in np.random.default_rng(0).integers(1, 250, 40)]
TEXTS = [
    "Hello world",
    " leading and  double   spaces\n\n\nnew lines\t tab ",
    "x = foo(bar[12345], 'it''s')  # don't",
    "Grüße, naïve café — 漢字 и кириллица 🙂",
    "",
    "<|endoftext|>Question: 7*8?\nAnswer:",
]


def _llama_or_skip() -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def _transformers_logits(folder: Path) -> npt.NDArray[np.float32]:
    """[T, V] of `IDS`, computed in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = model(torch.tensor([IDS])).logits[0].numpy()
    return logits


def _planned_copy(checkpoint: Checkpoint, plan: Plan, output: Path) -> Path:
    """The checkpoint that `plan` describes, as float32: experts dropped, packed and unpacked."""
    spec = checkpoint.spec
    tensors = {info.name: checkpoint.read(info.name) for info in checkpoint.dense_tensors}
    for layer_id, row in zip(plan.moe_layer_ids, plan.forms, strict=True):
        kept = plan.kept(row)
        for name in spec.router_tensor_names(layer_id):
            tensors[name] = tensors[name][kept]
        for new_id, expert_id in enumerate(kept):
            record = pack_expert(row[expert_id], *checkpoint.expert(layer_id, expert_id))
            matrices = unpack_expert(row[expert_id], record, *spec.expert_shape)
            names = spec.expert_tensor_names(layer_id, new_id)
            tensors.update(zip(names, matrices, strict=True))
    shutil.copytree(checkpoint.folder, output, ignore=shutil.ignore_patterns("*.safetensors"))
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, output / "model.safetensors", metadata={"format": "pt"})
    num_kept = len(plan.kept(plan.forms[0]))
    config = json.loads((output / "config.json").read_text())
    counts = {key: num_kept for key in spec.family.num_experts_keys if key in config}
    edit_config(output, dtype="float32", **counts)
    return output


def _layer_forms(checkpoint: Checkpoint, *forms: str) -> list[list[str]]:
    """[L][E] with every expert of layer l kept in `forms[l]`."""
    return [[form] * checkpoint.spec.num_experts for form in forms]


# ---------------------------------------------------------------------------- logits


@pytest.mark.parametrize(("family", "wide"), [("qwen3_moe", True), ("olmoe", False)])
@pytest.mark.parametrize("num_kept", [8, 5])
def test_float32_forms_agree_with_transformers(
    family: str, wide: bool, num_kept: int, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    _llama_or_skip()
    checkpoint = Checkpoint(tiny_checkpoint(family, wide=wide))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, num_kept, "f32"), "gguf")
    path = export_gguf(plan, checkpoint, tmp_path / "model.gguf")
    expected = _transformers_logits(_planned_copy(checkpoint, plan, tmp_path / "pruned"))
    found = ask_llama(path, tmp_path, IDS).logits
    assert np.abs(found - expected).max() < 1e-3


def test_the_demo_model_agrees_with_transformers(demo_model: Path, tmp_path: Path) -> None:
    _llama_or_skip()
    checkpoint = Checkpoint(demo_model)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 12, "f32"), "gguf")
    path = export_gguf(plan, checkpoint, tmp_path / "model.gguf")
    expected = _transformers_logits(_planned_copy(checkpoint, plan, tmp_path / "pruned"))
    found = ask_llama(path, tmp_path, IDS).logits
    assert np.abs(found - expected).max() < 1e-3


@pytest.fixture(scope="module")
def dense_routing(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """float32 qwen3_moe with top_k = num_experts = 4: no choice that rounding could flip."""
    folder = tmp_path_factory.mktemp("dense-routing")
    counts = {"num_experts": 4, "num_experts_per_tok": 4}
    return Checkpoint(
        make_tiny_checkpoint(folder, "qwen3_moe", width=256, dtype="float32", **counts)
    )


@pytest.mark.parametrize(
    "form",
    ["tq1_0", "tq2_0", "q2_0", "q2_k", "q3_k", "q4_0", "q4_k", "q5_k", "q6_k", "q8_0", "f16"]
    + ["bf16", "q4_k/q4_k/q6_k"],
)
def test_packed_forms_agree_with_their_unpacked_weights(
    form: str, dense_routing: Checkpoint, tmp_path: Path
) -> None:
    _llama_or_skip()
    plan = hand_plan(dense_routing, _layer_forms(dense_routing, form, form), "gguf")
    path = export_gguf(plan, dense_routing, tmp_path / "model.gguf")
    expected = _transformers_logits(_planned_copy(dense_routing, plan, tmp_path / "unpacked"))
    found = ask_llama(path, tmp_path, IDS).logits
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < {"f16": 2e-3, "bf16": 2e-2}.get(form, 6e-2)


def test_layers_may_differ_in_form(dense_routing: Checkpoint, tmp_path: Path) -> None:
    forms = _layer_forms(dense_routing, "q4_k", "q3_k/q3_k/q5_k")
    plan = hand_plan(dense_routing, forms, "gguf")
    header = read_gguf_header(export_gguf(plan, dense_routing, tmp_path / "model.gguf"))
    types = {tensor.name: tensor.type_name for tensor in header.tensors}
    assert types["blk.0.ffn_down_exps.weight"] == "Q4_K"
    parts = [types[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")]
    assert parts == ["Q3_K", "Q3_K", "Q5_K"]


# ---------------------------------------------------------------------------- bytes and metadata


def _tensor_bytes(header: GgufHeader, name: str) -> bytes:
    (tensor,) = (tensor for tensor in header.tensors if tensor.name == name)
    return header.path.read_bytes()[tensor.offset : tensor.offset + tensor.num_bytes]


@pytest.mark.parametrize("is_fused", [False, True])
def test_experts_are_our_packed_bytes(
    is_fused: bool, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("qwen3_moe", wide=True)
    checkpoint = Checkpoint(fused_copy(folder, tmp_path / "fused") if is_fused else folder)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 3, "tq1_0"), "gguf")
    header = read_gguf_header(export_gguf(plan, checkpoint, tmp_path / "model.gguf"))
    form = get_form("tq1_0")
    for layer_id, row in enumerate(plan.forms):
        kept = plan.kept(row)
        experts = [checkpoint.expert(layer_id, expert_id) for expert_id in kept]
        for index, projection in enumerate(("gate", "up", "down")):
            packed = b"".join(form.pack(expert[index]).tobytes() for expert in experts)
            assert _tensor_bytes(header, f"blk.{layer_id}.ffn_{projection}_exps.weight") == packed
        router = checkpoint.read(f"model.layers.{layer_id}.mlp.gate.weight")[kept]
        assert _tensor_bytes(header, f"blk.{layer_id}.ffn_gate_inp.weight") == router.tobytes()
    embedding = checkpoint.read_raw("model.embed_tokens.weight")
    assert _tensor_bytes(header, "token_embd.weight") == embedding


def test_every_key_that_llama_cpp_needs_is_written(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe", wide=True))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 5, "q4_k"), "gguf")
    metadata = read_gguf_header(export_gguf(plan, checkpoint, tmp_path / "model.gguf")).metadata
    expected: dict[str, Any] = {
        "general.architecture": "qwen3moe",
        "general.type": "model",
        "general.file_type": 15,
        "general.quantization_version": 2,
        "edge_moe.source_fingerprint": checkpoint.fingerprint,
        "qwen3moe.context_length": 512,
        "qwen3moe.embedding_length": 256,
        "qwen3moe.block_count": 2,
        "qwen3moe.feed_forward_length": 128,
        "qwen3moe.expert_feed_forward_length": 256,
        "qwen3moe.attention.head_count": 4,
        "qwen3moe.attention.head_count_kv": 2,
        "qwen3moe.attention.key_length": 32,
        "qwen3moe.attention.value_length": 32,
        "qwen3moe.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "qwen3moe.rope.freq_base": 10000.0,
        "qwen3moe.expert_count": 5,
        "qwen3moe.expert_used_count": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: metadata[key] for key in expected} == expected
    for key in ("tokens", "token_type"):
        array = metadata[f"tokenizer.ggml.{key}"]
        assert isinstance(array, GgufArray) and array.count == 320


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "tied", "qwen3_moe", tie_word_embeddings=True)
    checkpoint = Checkpoint(folder)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8, "f32"), "gguf")
    path = export_gguf(plan, checkpoint, tmp_path / "model.gguf")
    assert "output.weight" not in {tensor.name for tensor in read_gguf_header(path).tensors}
    _llama_or_skip()
    difference = ask_llama(path, tmp_path, IDS).logits - _transformers_logits(folder)
    assert np.abs(difference).max() < 1e-3


# ---------------------------------------------------------------------------- tokenizers

CORPUS = [
    "Hello world, hello words!",
    "x = foo(bar[12345])  # don't",
    "Grüße 漢字 кириллица 🙂\n\n",
]
QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _train_tokenizer(folder: Path, kind: str) -> Any:
    """A small byte-level BPE with merges, added tokens and a chat template, saved to `folder`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt-2")
    split = pre_tokenizers.Split(Regex(QWEN2_REGEX), "isolated")
    tokenizer.pre_tokenizer = (
        byte_level if kind == "gpt-2" else pre_tokenizers.Sequence([split, byte_level])
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("kind", ["gpt-2", "qwen2"])
def test_llama_cpp_splits_text_as_transformers_does(
    kind: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    _llama_or_skip()
    folder = tmp_path / "source"
    shutil.copytree(tiny_checkpoint("qwen3_moe"), folder)
    tokenizer = _train_tokenizer(folder, kind)
    checkpoint = Checkpoint(folder)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8), "gguf")
    answer = ask_llama(
        export_gguf(plan, checkpoint, tmp_path / "model.gguf"), tmp_path, IDS[:2], TEXTS
    )
    assert answer.tokens == [tokenizer.encode(text) for text in TEXTS]
    assert answer.metadata["tokenizer.ggml.pre"] == kind
    assert answer.metadata["tokenizer.ggml.eos_token_id"] == "1"
    assert answer.metadata["tokenizer.chat_template"] == tokenizer.chat_template


def test_the_demo_tokenizer_splits_text_as_transformers_does(
    demo_model: Path, tmp_path: Path
) -> None:
    _llama_or_skip()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    checkpoint = Checkpoint(demo_model)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 2, "q4_k"), "gguf")
    path = export_gguf(plan, checkpoint, tmp_path / "model.gguf")
    answer = ask_llama(path, tmp_path, IDS[:2], TEXTS)
    assert answer.tokens == [tokenizer.encode(text) for text in TEXTS]
    assert answer.metadata["tokenizer.chat_template"] == tokenizer.chat_template


def test_a_vocabulary_by_hand(tmp_path: Path) -> None:
    _write_tokenizer(tmp_path, lambda tokenizer: None)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<e>"}}')
    (tmp_path / "config.json").write_text(
        '{"eos_token_id": 0, "bos_token_id": [3], "pad_token_id": 9}'
    )
    vocabulary = read_vocabulary(tmp_path, 6)
    assert vocabulary.tokens == ["a", "b", "ab", "<e>", "<tool>", "[PAD5]"]
    assert vocabulary.token_types == [1, 1, 1, 3, 4, 5]
    assert vocabulary.merges == ["a b"]
    assert vocabulary.special_ids == {"bos": 3, "eos": 3}  # pad 9 is not in the vocabulary
    assert (vocabulary.adds_bos, vocabulary.adds_eos) == (True, False)
    assert vocabulary.chat_template is None


def test_a_chat_template_file_comes_first(tmp_path: Path) -> None:
    _write_tokenizer(tmp_path, lambda tokenizer: None)
    templates = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert read_vocabulary(tmp_path, 6).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_vocabulary(tmp_path, 6).chat_template == "file"


def _write_tokenizer(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """tokenizer.json with three tokens, one merge, two added tokens and a BOS template."""
    special = {"SpecialToken": {"id": "<e>", "type_id": 0}}
    tokenizer: dict[str, Any] = {
        "added_tokens": [
            {"id": 3, "content": "<e>", "special": True},
            {"id": 4, "content": "<tool>", "special": False},
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        },
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    }
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


LLAMA3_SPLIT = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}, "behavior": "Isolated"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"].update(type="Unigram"), "is 'Unigram'"),
        (lambda t: t["model"].update(byte_fallback=True), "byte_fallback=True"),
        (lambda t: t["model"].update(ignore_merges=True, merges=[]), "ignore_merges=True"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "normaliser 'Lowercase'"),
        (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "pre-tokeniser"),
        (lambda t: t.update(pre_tokenizer=None), "pre-tokeniser"),
        (
            lambda t: t.update(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [LLAMA3_SPLIT, {"type": "ByteLevel", "use_regex": False}],
                }
            ),
            "known are qwen2, gpt-2",
        ),
        (lambda t: t["model"]["vocab"].update(z=6), "token id 6, but the embedding has 6 rows"),
    ],
)
def test_refuses_tokenizers_that_llama_cpp_would_split_differently(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    _write_tokenizer(tmp_path, change)
    with pytest.raises(TargetError, match=message):
        read_vocabulary(tmp_path, 6)


def test_refuses_a_missing_or_broken_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="needs .*tokenizer.json"):
        read_vocabulary(tmp_path, 6)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TargetError, match="not readable JSON"):
        read_vocabulary(tmp_path, 6)


# ---------------------------------------------------------------------------- refusals


def test_refuses_plans_that_one_file_cannot_hold(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe"))
    uneven = _layer_forms(checkpoint, "bf16", "bf16")
    uneven[1][3] = DROP
    mixed = _layer_forms(checkpoint, "bf16", "bf16")
    mixed[1][3] = "q4_0"
    narrow = _layer_forms(checkpoint, "bf16", "q4_k")
    for forms, message in (
        (uneven, "layer 1 keeps 7 experts and layer 0 keeps 8"),
        (mixed, "layer 1 mixes the forms bf16, q4_0"),
        (narrow, "layer 1 is planned as q4_k, whose blocks do not divide 64"),
    ):
        with pytest.raises(TargetError, match=message):
            export_gguf(hand_plan(checkpoint, forms), checkpoint, tmp_path / "model.gguf")
    assert not any(tmp_path.iterdir())


def test_refuses_other_architectures(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("phimoe"))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8))
    with pytest.raises(TargetError, match="weighs experts by a softmax, this model by sparsemixer"):
        export_gguf(plan, checkpoint, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("olmoe", {"norm_topk_prob": True}, "always has norm_topk_prob=False"),
        ("qwen3_moe", {"norm_topk_prob": False}, "always has norm_topk_prob=True"),
        ("olmoe", {"clip_qkv": 8.0}, "has no clip_qkv=8.0"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "has no hidden_act='gelu'"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=True"),
        (
            "qwen3_moe",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope_type='yarn'",
        ),
        ("qwen3_moe", {"rope_parameters": None}, "rope_theta is None"),
        ("qwen3_moe", {"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
    ],
)
def test_refuses_configurations_that_llama_cpp_does_not_compute(
    family: str,
    changes: dict[str, Any],
    message: str,
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(tiny_checkpoint(family), folder)
    edit_config(folder, **changes)
    checkpoint = Checkpoint(folder)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8))
    with pytest.raises(TargetError, match=message):
        export_gguf(plan, checkpoint, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_refuses_models_with_dense_layers(tmp_path: Path) -> None:
    checkpoint = Checkpoint(
        make_tiny_checkpoint(tmp_path / "source", "qwen3_moe", mlp_only_layers=[0])
    )
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8))
    with pytest.raises(TargetError, match="in 1 of 2"):
        export_gguf(plan, checkpoint, tmp_path / "model.gguf")


def test_a_full_disk_is_noticed_before_writing(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**5)
    monkeypatch.setattr("edge_moe.files.shutil.disk_usage", lambda path: usage)
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe"))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8))
    with pytest.raises(DiskSpaceError, match="GGUF file model.gguf needs"):
        export_gguf(plan, checkpoint, tmp_path / "model.gguf")
    assert not any(tmp_path.iterdir())


def test_a_failed_export_leaves_nothing_behind(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CheckpointError("damaged")

    monkeypatch.setattr("edge_moe.converters.export_gguf.write_tensor_at", fail)
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe"))
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8))
    with pytest.raises(CheckpointError):
        export_gguf(plan, checkpoint, tmp_path / "model.gguf")
    assert not any(tmp_path.iterdir())


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edge-moe\[gguf\]'"):
        gguf_writer.import_gguf()
