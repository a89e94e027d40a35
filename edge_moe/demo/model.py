"""The demo network: a Qwen3-MoE of 14.4 M parameters, built, saved and loaded; and a dense one.

Hidden size and expert size are both 256 on purpose: ggml's K-quants and ternary forms need rows
that are multiples of 256.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from edge_moe.demo.tokenizer import MODEL_MAX_LENGTH, VOCAB_SIZE

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": MODEL_MAX_LENGTH,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def demo_config() -> Qwen3MoeConfig:
    """4 layers of 16 experts, of which the router picks 2 per token."""
    settings: dict[str, Any] = {
        "head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "intermediate_size": 512,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return Qwen3MoeConfig(**_COMMON, **settings)


def dense_config() -> LlamaConfig:
    """A dense model to upcycle, 4.2 M parameters: as wide and deep, one feed-forward layer of 768
    in the place of the experts."""
    return LlamaConfig(**_COMMON, intermediate_size=768)


def new_model(experts_implementation: str) -> Qwen3MoeForCausalLM:
    """A freshly initialised mixture of experts."""
    config = demo_config()
    config._experts_implementation = experts_implementation
    model = Qwen3MoeForCausalLM(config)
    _initialise(model, config.num_hidden_layers)
    return model


def new_dense_model() -> LlamaForCausalLM:
    """A freshly initialised dense model."""
    config = dense_config()
    model = LlamaForCausalLM(config)
    _initialise(model, config.num_hidden_layers)
    return model


def _initialise(model: nn.Module, num_layers: int) -> None:
    """What enters the residual stream is scaled by the model's depth."""
    scale = 1 / math.sqrt(2 * num_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                parameter.mul_(scale)
            elif name.endswith("mlp.gate.weight"):
                parameter.normal_(0, 0.02)


def _add_expert_count(config_path: Path) -> None:
    """Writes the number of experts under both names that readers of config.json look for."""
    config = json.loads(config_path.read_text())
    count = config.get("num_experts") or config.get("num_local_experts")
    if not count:
        return
    config["num_experts"] = config["num_local_experts"] = count
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_model(model: Any, tokenizer_dir: Path, out: Path) -> None:
    """Saves `model` (which becomes bf16) and the tokenizer as a Hugging Face checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    defaults = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "max_new_tokens": 64}
    model.generation_config = GenerationConfig.from_dict({**defaults, "do_sample": False})
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    _add_expert_count(out / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_dir / name, out / name)
