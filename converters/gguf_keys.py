"""config.json -> keys that only some of llama.cpp's architectures read.

The writer (a gguf.GGUFWriter) adds the architecture's prefix.
"""

from __future__ import annotations

from typing import Any

from edge_moe.config_reader import ConfigReader
from edge_moe.converters.gguf_family import GgufSource
from edge_moe.layer_rules import hybrid_blocks

_GATING = {"softmax": 1, "sigmoid": 2}  # llama_expert_gating_func_type


def kv_heads(writer: Any, source: GgufSource) -> None:
    """Heads of keys and values, the same in every layer."""
    writer.add_head_count_kv(source.spec.num_kv_heads)


def head_widths(writer: Any, source: GgufSource) -> None:
    """Heads as wide in queries, keys and values, rotated whole or in part."""
    width = source.head_width
    writer.add_key_length(width)
    writer.add_value_length(width)
    rotated = source.config.get("rotary_dim")  # MiniMax's own key
    if rotated is None:
        rotated = int(width * source.rope.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(rotated)


def dense_width(writer: Any, source: GgufSource) -> None:
    """Width of dense feed-forward layers, or of experts where config.json has no other."""
    writer.add_feed_forward_length(source.number("intermediate_size"))


def rope_base(writer: Any, source: GgufSource) -> None:
    writer.add_rope_freq_base(rope_theta(source.rope))


def rope_theta(rope: Any) -> float:
    """The base of rotary frequencies.

    Raises:
        TargetError: no positive number.
    """
    return float(GgufSource.number_of(rope, "rope_theta"))


def yarn(writer: Any, source: GgufSource) -> None:
    """Stretched rotary positions, where config.json has them."""
    if source.rope_type != "yarn":
        return
    rope = source.rope
    writer.add_string(f"{writer.arch}.rope.scaling.type", "yarn")
    writer.add_rope_scaling_factor(float(GgufSource.number_of(rope, "factor")))
    writer.add_rope_scaling_orig_ctx_len(
        int(GgufSource.number_of(rope, "original_max_position_embeddings"))
    )
    if rope.get("mscale_all_dim"):  # llama.cpp divides it by 0.1 again
        writer.add_rope_scaling_yarn_log_mul(0.1 * float(rope["mscale_all_dim"]))


def latent_attention(writer: Any, source: GgufSource) -> None:
    """Latent attention as llama.cpp runs it: one key and value head, as wide as the latent."""
    latent, rotary = source.number("kv_lora_rank"), source.number("qk_rope_head_dim")
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(int(source.config.get("q_lora_rank") or 0))
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rotary)
    writer.add_value_length(latent)
    writer.add_key_length_mla(source.number("qk_nope_head_dim") + rotary)
    writer.add_value_length_mla(source.number("v_head_dim"))
    writer.add_rope_dimension_count(rotary)


def leading_dense(writer: Any, source: GgufSource) -> None:
    writer.add_leading_dense_block_count(source.spec.moe_layer_ids[0])


def stated_routing(writer: Any, source: GgufSource) -> None:
    """How experts are chosen and weighted, for graphs that read all of it."""
    router = source.spec.router
    writer.add_expert_weights_norm(router.renormalises)
    writer.add_expert_weights_scale(router.scale)
    gating_function(writer, source)
    if router.num_groups > router.top_groups:
        writer.add_expert_group_count(router.num_groups)
        writer.add_expert_group_used_count(router.top_groups)


def gating_function(writer: Any, source: GgufSource) -> None:
    code = _GATING[source.spec.router.score_function]
    writer.add_uint32(f"{writer.arch}.expert_gating_func", code)


def shared_count(writer: Any, source: GgufSource) -> None:
    writer.add_expert_shared_count(source.spec.num_shared_experts)


def shared_width(writer: Any, source: GgufSource) -> None:
    """Width of the shared expert, stated or so many routed experts'."""
    spec = source.spec
    key = spec.family.shared_width_key
    width = source.number(key) if key else spec.num_shared_experts * spec.expert_width
    writer.add_expert_shared_feed_forward_length(width)


def granite_scales(writer: Any, source: GgufSource) -> None:
    writer.add_logit_scale(float(source.config.get("logits_scaling", 1.0)))
    writer.add_residual_scale(float(source.config.get("residual_multiplier", 1.0)))
    writer.add_embedding_scale(float(source.config.get("embedding_multiplier", 1.0)))
    writer.add_attention_scale(float(source.config.get("attention_multiplier", 1.0)))


def ernie_step(writer: Any, source: GgufSource) -> None:
    writer.add_interleave_moe_layer_step(1)


def sliding_window(writer: Any, source: GgufSource) -> None:
    """The window, and which layers have one."""
    writer.add_sliding_window(source.spec.sliding_window)
    pattern = [name == "sliding_attention" for name in source.layer_types]
    writer.add_sliding_window_pattern(pattern)


def short_convolution(writer: Any, source: GgufSource) -> None:
    """Layers without keys and values are convolutions."""
    count = source.spec.num_kv_heads
    is_attention = [name == "full_attention" for name in source.layer_types]
    writer.add_head_count_kv([count if here else 0 for here in is_attention])
    writer.add_shortconv_l_cache(source.number("conv_L_cache"))


def delta_net(writer: Any, source: GgufSource) -> None:
    """Gated delta nets, and the layers that are none."""
    heads = source.number("linear_num_value_heads")
    writer.add_ssm_conv_kernel(source.number("linear_conv_kernel_dim"))
    writer.add_ssm_state_size(source.number("linear_key_head_dim"))
    writer.add_ssm_group_count(source.number("linear_num_key_heads"))
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(heads * source.number("linear_value_head_dim"))
    recurrent = [name == "linear_attention" for name in delta_net_layers(source)]
    writer.add_array(f"{writer.arch}.attention.recurrent_layers", recurrent)


def delta_net_layers(source: GgufSource) -> list[str]:
    """`layer_types`, or every `full_attention_interval`-th layer full attention."""
    if source.config.get("layer_types"):
        return source.layer_types
    step = int(source.config.get("full_attention_interval") or 4)
    kinds = ("full_attention", "linear_attention")
    return [kinds[min(1, (layer + 1) % step)] for layer in range(source.spec.num_layers)]


def picture_positions(writer: Any, source: GgufSource) -> None:
    """Sections of rotary positions in pictures; text has the same position in all of them."""
    sections = list(source.rope.get("mrope_section") or (11, 11, 10))
    writer.add_rope_dimension_sections([*sections, 0][:4])


def mamba(writer: Any, source: GgufSource) -> None:
    """Nemotron-H: every layer is Mamba, attention or experts, told apart by counts of 0."""
    spec, heads = source.spec, source.number("mamba_num_heads")
    blocks = hybrid_blocks(ConfigReader(dict(source.config), "config.json"))
    is_attention = [name in ("attention", "full_attention") for name in blocks]
    writer.add_head_count_kv([spec.num_kv_heads if here else 0 for here in is_attention])
    writer.add_feed_forward_length([spec.expert_width if name == "moe" else 0 for name in blocks])
    writer.add_ssm_conv_kernel(source.number("conv_kernel"))
    writer.add_ssm_state_size(source.number("ssm_state_size"))
    writer.add_ssm_group_count(source.number("n_groups"))
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(heads * source.number("mamba_head_dim"))
    writer.add_layer_norm_eps(source.number("layer_norm_epsilon"))
    writer.add_key_length(source.head_width)
    writer.add_value_length(source.head_width)
    if spec.latent_width:
        writer.add_moe_latent_size(spec.latent_width)


def gemma_attention(writer: Any, source: GgufSource) -> None:
    """Gemma 4: full-attention layers have heads and rotary positions of their own."""
    spec, width = source.spec, source.head_width
    rope = source.config["rope_parameters"]
    full_width = gemma_global_width(source)
    full_heads = spec.kv_key_width // full_width
    counts = {"full_attention": full_heads, "sliding_attention": spec.num_kv_heads}
    writer.add_head_count_kv([counts[name] for name in source.layer_types])
    writer.add_key_length(full_width)
    writer.add_value_length(full_width)
    writer.add_key_length_swa(width)
    writer.add_value_length_swa(width)
    writer.add_rope_dimension_count(full_width)
    writer.add_rope_dimension_count_swa(width)
    writer.add_rope_freq_base(rope_theta(rope["full_attention"]))
    writer.add_rope_freq_base_swa(rope_theta(rope["sliding_attention"]))
    writer.add_shared_kv_layers(0)
    writer.add_embedding_length_per_layer_input(0)
    writer.add_final_logit_softcapping(spec.logit_softcap)  # llama.cpp takes none for 30


def gemma_global_width(source: GgufSource) -> int:
    """Head width of full-attention layers, under the keys of either release of transformers."""
    layers = source.config.get("per_layer_config")
    own: dict[str, Any] = next(iter(layers.values()), {}) if layers else {}
    return int(own.get("head_dim") or source.config.get("global_head_dim") or source.head_width)
