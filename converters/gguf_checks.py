"""What llama.cpp's graphs do not compute: each check names it, as in `has no KEY=VALUE`."""

from __future__ import annotations

from typing import Any

from edge_moe.config_reader import ConfigReader
from edge_moe.converters.gguf_family import Check, GgufSource
from edge_moe.converters.gguf_keys import delta_net_layers
from edge_moe.layer_rules import hybrid_blocks


def only(key: str, *values: Any) -> Check:
    """config.json's `key` has one of `values`; None stands for a missing key."""

    def check(source: GgufSource) -> str | None:
        found = source.config.get(key)
        return None if found in values else f"{key}={found!r}"

    return check


def silu(source: GgufSource) -> str | None:
    found = source.spec.hidden_act
    return None if found == "silu" else f"hidden_act={found!r}"


def squared_relu(source: GgufSource) -> str | None:
    found = source.spec.hidden_act
    return None if found == "relu2" else f"mlp_hidden_act={found!r}"


def tanh_gelu(source: GgufSource) -> str | None:
    found = source.spec.hidden_act
    return None if found == "gelu_pytorch_tanh" else f"hidden_activation={found!r}"


def plain_rope(source: GgufSource) -> str | None:
    found = source.rope_type
    return None if found == "default" else f"rope_parameters.rope_type={found!r}"


def yarn_rope(source: GgufSource) -> str | None:
    """Plain, or yarn with the two bounds that are built into llama.cpp."""
    if source.rope_type != "yarn":
        return plain_rope(source)
    rope = source.rope
    built_in: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("beta_fast", (32, None)),
        ("beta_slow", (1, None)),
        ("attention_factor", (None,)),
    )
    for key, values in built_in:
        if rope.get(key) not in values:
            return f"rope_parameters.{key}={rope[key]!r}"
    return None


def latent_yarn(source: GgufSource) -> str | None:
    """With latent attention llama.cpp takes mscale and mscale_all_dim for equal."""
    rope = source.rope
    if source.rope_type == "yarn":
        pair = rope.get("mscale"), rope.get("mscale_all_dim")
        if not pair[0] or pair[0] != pair[1]:
            return f"rope_parameters.mscale={pair[0]!r} beside mscale_all_dim={pair[1]!r}"
    return yarn_rope(source)


def experts_in_every_layer(source: GgufSource) -> str | None:
    spec = source.spec
    if spec.num_moe_layers == spec.num_layers:
        return None
    return (
        f"dense layers; this checkpoint has experts in {spec.num_moe_layers} of {spec.num_layers}"
    )


def experts_after_dense(source: GgufSource) -> str | None:
    spec = source.spec
    first = spec.moe_layer_ids[0]
    if spec.moe_layer_ids == tuple(range(first, spec.num_layers)):
        return None
    return f"dense layers after the first with experts (layer {first})"


def as_wide_as_hidden(source: GgufSource) -> str | None:
    """Queries of all heads are as wide as the hidden state."""
    spec = source.spec
    if spec.query_width == spec.hidden_size:
        return None
    return f"attention heads of {spec.query_width} together beside hidden_size={spec.hidden_size}"


def keys_for_every_head(source: GgufSource) -> str | None:
    spec = source.spec
    if spec.num_kv_heads == spec.num_attention_heads:
        return None
    return f"num_key_value_heads={spec.num_kv_heads} beside {spec.num_attention_heads} heads"


def shared_expert(source: GgufSource) -> str | None:
    count = source.spec.num_shared_experts
    return None if count else f"n_shared_experts={count}"


def queries_as_lite_models(source: GgufSource) -> str | None:
    """llama.cpp takes DeepSeek models of 26 and 27 layers for those without a query latent."""
    num_layers = source.spec.num_layers
    looks_lite = num_layers in (26, 27) or (num_layers == 48 and source.spec.vocab_size == 128_256)
    rank = source.config.get("q_lora_rank")
    return f"q_lora_rank={rank} in {num_layers} layers" if looks_lite and rank else None


def selection_bias(source: GgufSource) -> str | None:
    has_bias = source.spec.router.has_selection_bias
    return None if has_bias else "router without a selection bias"


def equal_delta_widths(source: GgufSource) -> str | None:
    widths = [source.config.get(f"linear_{kind}_head_dim") for kind in ("key", "value")]
    if widths[0] == widths[1]:
        return None
    return f"linear_key_head_dim={widths[0]} beside linear_value_head_dim={widths[1]}"


def full_or_linear(source: GgufSource) -> str | None:
    known = ("full_attention", "linear_attention")
    found = next((name for name in delta_net_layers(source) if name not in known), None)
    return found and f"layers of type {found!r}"


def no_dense_blocks(source: GgufSource) -> str | None:
    blocks = hybrid_blocks(ConfigReader(dict(source.config), "config.json"))
    return "blocks of type 'mlp' beside experts" if "mlp" in blocks else None


def gemma_rope(source: GgufSource) -> str | None:
    """Full-attention layers rotate a share of each head, sliding ones all of it."""
    found = source.config.get("rope_parameters") or {}
    wanted = {"full_attention": ("proportional", "default"), "sliding_attention": ("default",)}
    for name, types in wanted.items():
        rope = found.get(name) or {}
        if rope.get("rope_type") not in types:
            return f"rope_parameters.{name}.rope_type={rope.get('rope_type')!r}"
    share = found["sliding_attention"].get("partial_rotary_factor", 1.0)
    return None if share == 1.0 else f"partial_rotary_factor={share} in sliding layers"
