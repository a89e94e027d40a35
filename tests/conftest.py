"""Shared fixtures: tiny random checkpoints of every supported family, and the demo model."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: spinning threads stall
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

FAMILY_NAMES = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "deepseek_v3")

TinyCheckpoint = Callable[..., Path]


def _config_arguments(family: str, width: int) -> dict[str, Any]:
    """config.json values of a tiny model: 2-3 layers, 8 experts, top-2, rows of `width` weights."""
    common: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    moe: dict[str, dict[str, Any]] = {
        "qwen3_moe": {
            "num_experts": 8,
            "head_dim": 32,
            "intermediate_size": 128,
            "moe_intermediate_size": width,
            "norm_topk_prob": True,
        },
        "qwen2_moe": {
            "num_experts": 8,
            "intermediate_size": 128,
            "moe_intermediate_size": width,
            "shared_expert_intermediate_size": 96,
            "norm_topk_prob": False,
        },
        "olmoe": {
            "num_experts": 8,
            "intermediate_size": width,
            "num_key_value_heads": 4,
            "norm_topk_prob": False,
        },
        "mixtral": {"num_local_experts": 8, "head_dim": 32, "intermediate_size": width},
        "deepseek_v3": {
            "num_hidden_layers": 3,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "intermediate_size": 128,
            "moe_intermediate_size": width,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": True,
        },
    }
    return common | moe[family]


def _byte_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: 256 bytes plus <|endoftext|> (id 0)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<|endoftext|>": 0}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)


def make_tiny_checkpoint(
    folder: Path,
    family: str,
    *,
    width: int = 64,
    seed: int = 0,
    dtype: str = "bfloat16",
    **config: Any,
) -> Path:
    """Write a random checkpoint of `family` to `folder`; keyword arguments override config keys."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    arguments = _config_arguments(family, width) | config
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **arguments))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.7, 1.3)
            else:
                parameter.normal_(0.0, 0.5 if "gate.weight" in name else 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.1, 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    _byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """`tiny_checkpoint(family, wide=False)`: folder of a session-cached tiny bf16 checkpoint.

    hidden_size and expert width are 64, or 256 with `wide=True` so that 256-weight blocks fit.
    """

    @cache
    def build(family: str, wide: bool = False) -> Path:
        folder = tmp_path_factory.mktemp(f"{family}-{'wide' if wide else 'tiny'}")
        return make_tiny_checkpoint(folder, family, width=256 if wide else 64)

    return build


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Folder of the embedded demo model."""
    from edge_moe.demo import demo_model_dir

    return demo_model_dir()
