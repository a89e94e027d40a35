"""Tiny random checkpoints of every family, for the tests and for `parity.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_moe.minimal_model import COMMON_CONFIG, minimal_config

ROUTER_NAMES = ("gate.weight", "router.weight", "router.proj.weight")


def write_byte_tokenizer(folder: Path) -> None:
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
    return _save_random(folder, family, minimal_config(family, width) | config, seed, dtype)


def make_tiny_dense(
    folder: Path,
    model_type: str,
    *,
    width: int = 64,
    seed: int = 0,
    dtype: str = "bfloat16",
    **config: Any,
) -> Path:
    """A random dense checkpoint, hidden_size and inner width both `width`."""
    arguments = COMMON_CONFIG | {"hidden_size": width, "intermediate_size": width} | config
    return _save_random(folder, model_type, arguments, seed, dtype)


def _save_random(
    folder: Path, model_type: str, arguments: dict[str, Any], seed: int, dtype: str
) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **arguments))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name.endswith("sinks"):
                parameter.uniform_(-0.1, 0.1)
            elif name.endswith("A_log"):
                parameter.uniform_(-4.0, -1.0)  # states that last for tens of tokens
            elif parameter.ndim == 1:
                usual = float(parameter.any())  # 0: a norm that multiplies by 1 + its weight
                parameter.uniform_(usual - 0.3, usual + 0.3)
            else:
                parameter.normal_(0.0, 0.5 if name.endswith(ROUTER_NAMES) else 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.uniform_(-0.1, 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder
