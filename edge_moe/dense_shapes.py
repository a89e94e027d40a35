"""The dense tensors that a config.json promises, with their shapes: damage shows in the headers.

H hidden_size, V vocab_size, E experts. Shapes are [outputs, inputs], as `torch.nn.Linear` stores
them. Biases are left out: which ones exist hangs on further keys.
"""

from __future__ import annotations

from typing import Any

from edge_moe.config_reader import ConfigReader
from edge_moe.spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]


def dense_shapes(spec: ModelSpec, config: dict[str, Any], source: str) -> Shapes:
    """Name -> shape of every tensor that the model cannot do without, routed experts excepted.

    Raises:
        SpecError: a key that gives a shape is missing or no positive integer.
    """
    read = ConfigReader({**spec.family.config_defaults, **config}, source)
    hidden = spec.hidden_size
    shapes: Shapes = {
        spec.embedding_name: (spec.vocab_size, hidden),
        spec.final_norm_name: (hidden,),
    }
    if not spec.tie_word_embeddings:
        shapes[spec.head_name] = (spec.vocab_size, hidden)
    moe_layers = set(spec.moe_layer_ids)
    attention = _attention(spec, read)
    norms = {name: (hidden,) for name in spec.family.layer_norms}
    for layer_id in range(spec.num_layers):
        prefix = spec.layer_prefix(layer_id).removesuffix(".")
        for name, shape in (attention | norms).items():
            shapes[f"{prefix}.{name}.weight"] = shape
        if layer_id in moe_layers:
            shapes |= _routers(spec, layer_id)
            shapes |= _shared_experts(spec, read, layer_id)
        elif spec.family.attention != "other":
            shapes |= _mlp(f"{prefix}.mlp", hidden, read.count("intermediate_size"))
    return shapes


def _attention(spec: ModelSpec, read: ConfigReader) -> Shapes:
    """Module below the layer -> shape of its weight; empty where only transformers knows."""
    if spec.family.attention == "latent":
        return _latent_attention(spec, read)
    if spec.family.attention == "other":
        return {}
    hidden, heads = spec.hidden_size, spec.num_attention_heads
    head_width = read.count("head_dim", default=hidden // heads)
    shapes: Shapes = {
        "self_attn.q_proj": (heads * head_width, hidden),
        "self_attn.k_proj": (spec.kv_key_width, hidden),
        "self_attn.v_proj": (spec.kv_value_width, hidden),
        "self_attn.o_proj": (hidden, heads * head_width),
    }
    if spec.family.qk_norm == "head":
        shapes |= {f"self_attn.{name}_norm": (head_width,) for name in ("q", "k")}
    if spec.family.qk_norm == "all":
        shapes["self_attn.q_norm"] = (heads * head_width,)
        shapes["self_attn.k_norm"] = (spec.kv_key_width,)
    return shapes


def _latent_attention(spec: ModelSpec, read: ConfigReader) -> Shapes:
    """DeepSeek's multi-head latent attention (arXiv:2412.19437, section 2.1.1)."""
    hidden, heads = spec.hidden_size, spec.num_attention_heads
    rope, latent = read.count("qk_rope_head_dim"), read.count("kv_lora_rank")
    value = read.count("v_head_dim")
    shapes: Shapes = {
        "self_attn.kv_a_proj_with_mqa": (latent + rope, hidden),
        "self_attn.kv_a_layernorm": (latent,),
        "self_attn.kv_b_proj": (heads * (read.count("qk_nope_head_dim") + value), latent),
        "self_attn.o_proj": (hidden, heads * value),
    }
    query_rank = read.count("q_lora_rank", default=0)
    if not query_rank:
        shapes["self_attn.q_proj"] = (spec.query_width, hidden)
        return shapes
    shapes["self_attn.q_a_proj"] = (query_rank, hidden)
    shapes["self_attn.q_a_layernorm"] = (query_rank,)
    shapes["self_attn.q_b_proj"] = (spec.query_width, query_rank)
    return shapes


def _routers(spec: ModelSpec, layer_id: int) -> Shapes:
    """The router's matrix is [E, H]."""
    return {spec.router_tensor_names(layer_id)[0]: (spec.num_experts, spec.hidden_size)}


def _shared_experts(spec: ModelSpec, read: ConfigReader, layer_id: int) -> Shapes:
    family, hidden = spec.family, spec.hidden_size
    if not spec.num_shared_experts or not spec.has_gate:
        return {}
    prefix = f"{spec.moe_prefix(layer_id)}.{family.shared_module}"
    if not family.shared_width_key:
        return _mlp(prefix, hidden, spec.num_shared_experts * spec.expert_width)
    gate: Shapes = {f"{prefix}_gate.weight": (1, hidden)}
    return _mlp(prefix, hidden, read.count(family.shared_width_key)) | gate


def _mlp(prefix: str, hidden: int, width: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }
