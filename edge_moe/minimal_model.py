"""The smallest model of a family: what the memory probe runs and what tests are made of."""

from __future__ import annotations

from typing import Any

from edge_moe.families import FAMILIES

COMMON_CONFIG: dict[str, Any] = {
    "vocab_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def minimal_config(model_type: str, width: int = 64, num_experts: int = 8) -> dict[str, Any]:
    """config.json values: top-2 of `num_experts` experts whose rows all have `width` weights."""
    family = FAMILIES[model_type]
    return {
        **COMMON_CONFIG,
        "hidden_size": width,
        family.num_experts_keys[0]: num_experts,
        family.top_k_keys[0]: 2,
        family.expert_width_keys[0]: width,
        **family.minimal,
    }
