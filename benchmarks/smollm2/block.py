"""The tensors and the configuration of the Mixture-of-Experts checkpoint (Qwen2MoeForCausalLM).

A Qwen2-MoE block adds sigmoid(g x) times a shared expert and p_e times every chosen expert, p the
softmax over all E experts, not renormalised. With router scores near 0, p_e is 1 / E, so down_proj
of the experts is stored E-fold; with g near 0 the sigmoid is 1/2, so the shared down_proj is stored
twofold. g is never exactly 0: llama.cpp computes this gate as silu(x) / x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from edge_moe.converters.upcycle.split_neurons import DenseFfn, NeuronSplit

ROUTER_SPREAD = 1e-3
"""Root mean square of the router's scores: p_e strays from 1 / E by about this much."""
SHARED_GATE_STD = 1e-5


def block_tensors(
    ffn: DenseFfn, split: NeuronSplit, router: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Every tensor of one MoE block, named as on disk inside the block."""
    num_experts = len(split.experts)
    hidden_size = ffn.gate.shape[1]
    tensors = {
        "gate.weight": router,
        "shared_expert.gate_proj.weight": ffn.gate[split.shared],
        "shared_expert.up_proj.weight": ffn.up[split.shared],
        "shared_expert.down_proj.weight": 2 * ffn.down[:, split.shared],
        "shared_expert_gate.weight": SHARED_GATE_STD
        * torch.randn(1, hidden_size, generator=generator),
    }
    for expert_id, neurons in enumerate(split.experts):
        prefix = f"experts.{expert_id}"
        tensors[f"{prefix}.gate_proj.weight"] = ffn.gate[neurons]
        tensors[f"{prefix}.up_proj.weight"] = ffn.up[neurons]
        tensors[f"{prefix}.down_proj.weight"] = num_experts * ffn.down[:, neurons]
    return tensors


def moe_config(
    dense: LlamaConfig, num_experts: int, expert_width: int, top_k: int
) -> dict[str, Any]:
    """config.json of the checkpoint, in the keys that every reader of Qwen2-MoE knows."""
    rotation: Any = dense.rope_parameters
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "dtype": "bfloat16",
        "hidden_act": dense.hidden_act,
        "vocab_size": dense.vocab_size,
        "hidden_size": dense.hidden_size,
        "intermediate_size": dense.intermediate_size,
        "num_hidden_layers": dense.num_hidden_layers,
        "num_attention_heads": dense.num_attention_heads,
        "num_key_value_heads": dense.num_key_value_heads,
        "max_position_embeddings": dense.max_position_embeddings,
        "rms_norm_eps": dense.rms_norm_eps,
        "rope_theta": rotation["rope_theta"],
        "tie_word_embeddings": True,
        "qkv_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": False,
        "moe_intermediate_size": expert_width,
        "shared_expert_intermediate_size": dense.intermediate_size - num_experts * expert_width,
        "bos_token_id": dense.bos_token_id,
        "eos_token_id": dense.eos_token_id,
        "pad_token_id": dense.pad_token_id,
    }
