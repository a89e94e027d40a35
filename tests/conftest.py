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

from edge_moe.minimal_model import minimal_config

FAMILY_NAMES = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "deepseek_v3")
"""Families on which every module is tested; `test_families.py` takes all of them."""

ROUTER_NAMES = ("gate.weight", "router.weight", "router.proj.weight")

TinyCheckpoint = Callable[..., Path]


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

    arguments = minimal_config(family, width) | config
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **arguments))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name.endswith("sinks"):
                parameter.uniform_(-0.1, 0.1)
            elif name.endswith("A_log"):
                parameter.uniform_(-1.0, 1.0)
            elif parameter.ndim == 1:
                parameter.uniform_(0.7, 1.3)
            else:
                parameter.normal_(0.0, 0.5 if name.endswith(ROUTER_NAMES) else 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
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
