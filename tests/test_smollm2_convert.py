"""A tiny random Llama becomes a Mixture-of-Experts checkpoint; GGUF weights are read as written."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from llama_worker import ask_llama
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import InputError
from smollm2.convert import RECORD_NAME, Settings, convert
from smollm2.measure import dense_model, measure, read_split
from smollm2.source import GgufLlama

IDS = torch.arange(5, 45)[None]
SMALL = Settings(num_experts=4, expert_width=16, top_k=2, num_windows=6, window_tokens=64)


@dataclass
class TinyLlama:
    """A `DenseModel` of two layers: 32 wide, 96 neurons, random weights that bfloat16 holds."""

    tokenizer_folder: Path
    fingerprint: str = "tiny"
    stop_at: int | None = None
    """`layer` of this number raises, as a kill would."""
    layers_read: list[int] = field(default_factory=list)

    @cached_property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )

    @cached_property
    def model(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        model: LlamaForCausalLM = LlamaForCausalLM(self.config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.uniform_(0.7, 1.3)
                else:
                    parameter.normal_(0.0, 0.2)
                parameter.copy_(parameter.bfloat16())
        model.eval()
        return model

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        found: Any = AutoTokenizer.from_pretrained(self.tokenizer_folder)
        assert isinstance(found, PreTrainedTokenizerFast)
        return found

    def layer(self, layer_id: int) -> dict[str, Tensor]:
        if layer_id == self.stop_at:
            raise KeyboardInterrupt
        self.layers_read.append(layer_id)
        return dict(self.model.model.layers[layer_id].state_dict())

    def embedding(self) -> Tensor:
        weight: Tensor = self.model.model.embed_tokens.weight.data
        return weight

    def final_norm(self) -> Tensor:
        weight: Tensor = self.model.model.norm.weight.data
        return weight


@pytest.fixture
def tiny(tiny_checkpoint: TinyCheckpoint) -> TinyLlama:
    return TinyLlama(tiny_checkpoint("qwen2_moe"))


def _logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits[0]
    return found


@pytest.mark.slow
def test_all_experts_of_the_checkpoint_are_the_dense_model(tiny: TinyLlama, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "moe", dataclasses.replace(SMALL, top_k=4, refit=False))
    spec = Checkpoint(tmp_path / "moe").spec
    assert (spec.num_experts, spec.expert_width, spec.top_k) == (4, 16, 4)
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    assert type(moe).__name__ == "Qwen2MoeForCausalLM"
    expected = _logits(tiny.model)
    assert (_logits(moe) - expected).norm() < 5e-3 * expected.norm()  # scores of 1e-3
    splits = read_split(tmp_path / "moe")
    assert len(splits) == 2
    for split in splits:
        places = torch.cat([split.shared, split.experts.flatten()])
        assert places.sort().values.tolist() == list(range(96))
    assert torch.equal(_logits(dense_model(tiny)), expected)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_writes_the_same(tiny: TinyLlama, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "straight", SMALL)
    stopped = TinyLlama(tiny.tokenizer_folder, stop_at=1)
    with pytest.raises(KeyboardInterrupt):
        convert(stopped, tmp_path / "killed", SMALL)
    assert not (tmp_path / "killed").exists() and stopped.layers_read == [0]
    resumed = TinyLlama(tiny.tokenizer_folder)
    convert(resumed, tmp_path / "killed", SMALL)
    assert resumed.layers_read == [1]
    straight, killed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("straight", "killed")
    )
    records = [json.loads(files.pop(RECORD_NAME)) for files in (straight, killed)]
    assert straight == killed
    assert records[0]["settings"] == records[1]["settings"] == dataclasses.asdict(SMALL)
    for layer in records[1]["layers"]:
        assert layer["error_after_refit"] < layer["error_before_refit"]
        assert 0 < layer["router_recall"] <= 1
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.slow
def test_measured_rows(tiny: TinyLlama, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "moe", dataclasses.replace(SMALL, refit=False))
    rows = {row.model: row for row in measure(tiny, tmp_path / "moe", ["code"], 1, (2, 4))}
    assert rows["top-2, dense down_proj"].kld == rows["top-2, as written"].kld  # no refit: the same
    full, half = rows["top-4, as written"].kld, rows["top-2, as written"].kld
    assert full is not None and half is not None
    assert full.value < 1e-3 < half.value
    assert rows["dense"].perplexity.value == pytest.approx(
        rows["top-4, as written"].perplexity.value, rel=1e-2
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"expert_width": 24}, "4 experts of 24 neurons are 96 of the dense FFN's 96"),
        ({"top_k": 5}, "top_k is 5: use 1 to 4"),
        ({"num_windows": 10**6}, "full windows, not 1000000"),
    ],
)
def test_bad_settings_are_refused(
    change: dict[str, Any], words: str, tiny: TinyLlama, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        convert(tiny, tmp_path / "moe", dataclasses.replace(SMALL, **change))
    assert not (tmp_path / "moe").exists()


# ---------------------------------------------------------------------------- GGUF


def _write_gguf(tiny: TinyLlama, path: Path) -> None:
    """The tiny model as llama.cpp's converter writes it, in float32."""
    gguf = pytest.importorskip("gguf")
    config, model = tiny.config, tiny.model.model
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(50_000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(config.vocab_size)
    vocab = tiny.tokenizer.get_vocab()
    tokens = sorted(vocab, key=lambda token: vocab[token])
    tokens += [f"[PAD{index}]" for index in range(len(tokens), config.vocab_size - 1)] + ["ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0].content }}")
    writer.add_tensor("token_embd.weight", tiny.embedding().numpy())
    writer.add_tensor("output_norm.weight", tiny.final_norm().numpy())
    for number, layer in enumerate(model.layers):
        tensors = {
            "attn_norm": layer.input_layernorm.weight,
            "attn_q": _pairs_together(layer.self_attn.q_proj.weight, 4),
            "attn_k": _pairs_together(layer.self_attn.k_proj.weight, 2),
            "attn_v": layer.self_attn.v_proj.weight,
            "attn_output": layer.self_attn.o_proj.weight,
            "ffn_norm": layer.post_attention_layernorm.weight,
            "ffn_gate": layer.mlp.gate_proj.weight,
            "ffn_up": layer.mlp.up_proj.weight,
            "ffn_down": layer.mlp.down_proj.weight,
        }
        for name, tensor in tensors.items():
            writer.add_tensor(f"blk.{number}.{name}.weight", tensor.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pairs_together(weight: Tensor, num_heads: int) -> Tensor:
    halves = weight.view(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


@pytest.mark.slow
def test_gguf_weights_and_tokens_are_those_of_llama_cpp(tiny: TinyLlama, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    _write_gguf(tiny, path)
    read = GgufLlama(path, "tiny")
    for name in ("hidden_size", "num_key_value_heads", "intermediate_size", "rms_norm_eps"):
        assert getattr(read.config, name) == getattr(tiny.config, name)
    found = _logits(dense_model(read))
    assert torch.equal(found, _logits(tiny.model))

    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    texts = ["ab 12  3\n\t4x", "for i in range(10):\n    ab[i] = 'é'", "<|endoftext|>ab"]
    answer = ask_llama(path, tmp_path, IDS[0].tolist(), texts)
    assert (found - torch.from_numpy(answer.logits)).abs().max() < 1e-3
    assert answer.tokens == [read.tokenizer.encode(text) for text in texts]
