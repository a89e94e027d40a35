"""How each architecture family spells its tensors. One table; `w1/w2/w3` appear nowhere else.

`{layer}` and `{expert}` are filled in by `ModelSpec`. `{proj}` becomes the family's own names.
Module paths are those of transformers 5, which stacks experts under `<moe_module>.experts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """Names of one architecture family, on disk and in transformers."""

    architecture: str
    """Class name in transformers, as in config.json's `architectures`."""
    moe_prefix: str
    """Checkpoint prefix of the MoE block, e.g. `model.layers.{layer}.mlp`."""
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """On-disk names of gate_proj, up_proj, down_proj."""
    moe_module: str = "model.layers.{layer}.mlp"
    """Module path of the MoE block in transformers."""
    num_experts_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    """config.json keys that may hold the number of routed experts; all present ones are patched."""
    router_tensors: tuple[str, ...] = ("gate.weight",)
    """Tensors under `moe_prefix` with one row per expert: sliced when experts are dropped."""
    optional_router_tensors: tuple[str, ...] = ()
    score_function: str = "softmax"
    fewest_experts: int = 1
    """A layer keeps at least this many: DeepSeek's router always takes the best two of a group."""
    always_renormalises: bool = False
    """Router weights are renormalised whatever `norm_topk_prob` says."""
    config_defaults: Mapping[str, Any] = field(default_factory=dict)
    """transformers' values of the keys that config.json leaves out."""
    gguf_arch: str | None = None
    """llama.cpp architecture this project can export to; None where it cannot."""
    gguf_renormalises: bool | None = None
    """llama.cpp hard-codes renormalisation per architecture; an export must agree."""
    config_expert_width_keys: tuple[str, ...] = ("moe_intermediate_size", "intermediate_size")
    shared_count_key: str = ""
    """config.json key that states a shared expert's width as so many routed experts' widths."""
    notes: tuple[str, ...] = field(default=())


FAMILIES: dict[str, Family] = {
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        moe_prefix="model.layers.{layer}.mlp",
        config_defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768},
        gguf_arch="qwen3moe",
        gguf_renormalises=True,
    ),
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        moe_prefix="model.layers.{layer}.mlp",
        config_defaults={
            "num_key_value_heads": 16,
            "max_position_embeddings": 32768,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        moe_prefix="model.layers.{layer}.mlp",
        config_defaults={"max_position_embeddings": 4096},
        config_expert_width_keys=("intermediate_size",),
        gguf_arch="olmoe",
        gguf_renormalises=False,
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        moe_prefix="model.layers.{layer}.block_sparse_moe",
        projections=("w1", "w3", "w2"),
        num_experts_keys=("num_local_experts", "num_experts"),
        always_renormalises=True,
        config_defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072},
        config_expert_width_keys=("intermediate_size",),
    ),
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        moe_prefix="model.layers.{layer}.mlp",
        num_experts_keys=("n_routed_experts", "num_local_experts", "num_experts"),
        optional_router_tensors=("gate.e_score_correction_bias",),
        score_function="sigmoid",
        fewest_experts=2,
        config_defaults={
            "max_position_embeddings": 4096,
            "first_k_dense_replace": 3,
            "n_shared_experts": 1,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        config_expert_width_keys=("moe_intermediate_size",),
        shared_count_key="n_shared_experts",
    ),
}
