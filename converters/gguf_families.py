"""Family by family: where tensors go in GGUF, what happens to them, which keys are needed.

Names, shapes and keys are those that llama.cpp's src/models/*.cpp loads, as of the release that
llama-cpp-python 0.3.36 brings. What an architecture routes by is in `edge_moe.gguf_arch`.
"""

from __future__ import annotations

import numpy as np

from edge_moe.converters import gguf_checks as checks
from edge_moe.converters import gguf_keys as keys
from edge_moe.converters import gguf_transforms as transforms
from edge_moe.converters.gguf_checks import only
from edge_moe.converters.gguf_family import MODEL_NAMES, GgufFamily, GgufSource, Names, Rule
from edge_moe.tensor_info import FloatArray

_NORMS: Names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_POST_NORMS: Names = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
}
_ATTENTION: Names = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_QK_NORMS: Names = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_PAIRED: Names = {
    "self_attn.q_proj": Rule(("attn_q",), transforms.rotary_pairs),
    "self_attn.k_proj": Rule(("attn_k",), transforms.rotary_pairs),
}
_LATENT: Names = {
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": Rule(("attn_k_b", "attn_v_b"), transforms.key_and_value),
    "self_attn.o_proj": "attn_output",
}
_DENSE: Names = {
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROUTER: Names = {"mlp.gate.weight": "ffn_gate_inp.weight"}
_BIASED_ROUTER: Names = {
    **_ROUTER,
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate.moe_statics.e_score_correction_bias": Rule(("exp_probs_b.bias",), transforms.flat),
}
_SHARED: Names = {
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_GATED_SHARED: Names = {
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": Rule(("ffn_gate_inp_shexp",), transforms.flat),
}
_SHIFTED_NORMS: Names = {
    name: Rule((found,), transforms.one_more)
    for name, found in {**_POST_NORMS, **_QK_NORMS}.items()
    if isinstance(found, str)
}
_SHIFTED_MODEL: Names = {
    **MODEL_NAMES,
    "model.norm": Rule(("output_norm",), transforms.one_more),
}
_DELTA_NET: Names = {
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": Rule(("ssm_a",), transforms.decay),
    "linear_attn.conv1d.weight": Rule(("ssm_conv1d.weight",), transforms.squeezed, is_float32=True),
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.in_proj_qkvz": Rule(("attn_qkv", "attn_gate"), transforms.query_key_value_gate),
}
_TILED_DELTA_NET: Names = {
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": Rule(("ssm_out",), transforms.value_head_columns),
    "linear_attn.dt_bias": Rule(("ssm_dt.bias",), transforms.value_heads),
    "linear_attn.A_log": Rule(("ssm_a",), transforms.decay_of_value_heads),
    "linear_attn.conv1d.weight": Rule(
        ("ssm_conv1d.weight",), transforms.last_value_head_rows, is_float32=True
    ),
    "linear_attn.in_proj_a": Rule(("ssm_alpha",), transforms.value_heads),
    "linear_attn.in_proj_b": Rule(("ssm_beta",), transforms.value_heads),
    "linear_attn.in_proj_z": Rule(("attn_gate",), transforms.value_head_rows),
    "linear_attn.in_proj_qkv": Rule(("attn_qkv",), transforms.last_value_head_rows),
}

_PLAIN = (checks.silu, checks.plain_rope, only("attention_bias", False, None))
_FULL_ATTENTION = (
    only("use_sliding_window", False, None),
    only("clip_qkv", None),
    checks.experts_in_every_layer,
)
_HEADS = (keys.head_widths, keys.rope_base, keys.dense_width)
_GROUPED = (keys.kv_heads, *_HEADS)
_DEEPSEEK = GgufFamily(
    layer={**_NORMS, **_LATENT, **_DENSE, **_BIASED_ROUTER, **_SHARED},
    keys=(
        keys.latent_attention,
        keys.rope_base,
        keys.dense_width,
        keys.yarn,
        keys.leading_dense,
        keys.stated_routing,
        keys.shared_count,
    ),
    checks=(
        checks.silu,
        checks.latent_yarn,
        checks.experts_after_dense,
        checks.shared_expert,
        checks.queries_as_lite_models,
        only("attention_bias", False, None),
        only("rope_interleave", True, None),
    ),
)


def _gemma_frequencies(source: GgufSource) -> dict[str, FloatArray]:
    """Divisors of rotary frequencies in full-attention layers: the last pairs stand still."""
    pairs = keys.gemma_global_width(source) // 2
    share = source.config["rope_parameters"]["full_attention"].get("partial_rotary_factor", 1.0)
    divisors = np.full(pairs, 1e30, np.float32)
    divisors[: int(pairs * share)] = 1.0
    return {"rope_freqs.weight": divisors}


GGUF_FAMILIES: dict[str, GgufFamily] = {
    "qwen3_moe": GgufFamily(
        layer={**_NORMS, **_ATTENTION, **_QK_NORMS, **_ROUTER},
        keys=_GROUPED,
        checks=(*_PLAIN, *_FULL_ATTENTION),
    ),
    "olmoe": GgufFamily(
        needs_output=True,
        layer={**_NORMS, **_ATTENTION, **_QK_NORMS, **_ROUTER},
        keys=_GROUPED,
        checks=(
            *_PLAIN,
            *_FULL_ATTENTION,
            checks.keys_for_every_head,
            checks.as_wide_as_hidden,
        ),
    ),
    "mixtral": GgufFamily(
        layer={**_NORMS, **_ATTENTION, **_PAIRED, **_ROUTER},
        keys=_GROUPED,
        checks=(*_PLAIN, only("sliding_window", None), checks.experts_in_every_layer),
    ),
    "qwen2_moe": GgufFamily(
        needs_output=True,
        layer={**_NORMS, **_ATTENTION, **_ROUTER, **_GATED_SHARED},
        keys=(*_GROUPED, keys.shared_width),
        checks=(*_PLAIN, *_FULL_ATTENTION, checks.as_wide_as_hidden),
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe_lite": _DEEPSEEK,
    "glm4_moe": GgufFamily(
        layer={
            **_POST_NORMS,
            **_ATTENTION,
            **_QK_NORMS,
            **_DENSE,
            **_BIASED_ROUTER,
            **_SHARED,
        },
        keys=(*_GROUPED, keys.leading_dense, keys.stated_routing, keys.shared_count),
        checks=(
            checks.silu,
            checks.plain_rope,
            checks.experts_after_dense,
            checks.shared_expert,
        ),
    ),
    "gpt_oss": GgufFamily(
        needs_output=True,
        layer={
            **_POST_NORMS,
            **_ATTENTION,
            "self_attn.sinks": "attn_sinks.weight",
            "mlp.router": "ffn_gate_inp",
            "mlp.experts.gate_up_proj_bias": Rule(
                ("ffn_gate_exps.bias", "ffn_up_exps.bias"), transforms.taking_turns
            ),
            "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
        },
        keys=(*_GROUPED, keys.yarn, keys.sliding_window),
        checks=(
            checks.silu,
            checks.yarn_rope,
            only("swiglu_alpha", 1.702, None),
            only("swiglu_limit", 7.0, None),
        ),
    ),
    "minimax_m2": GgufFamily(
        needs_output=True,
        layer={
            **_NORMS,
            **_ATTENTION,
            **_QK_NORMS,
            **_ROUTER,
            "mlp.e_score_correction_bias": "exp_probs_b.bias",
        },
        keys=(*_GROUPED, keys.gating_function),
        checks=(*_PLAIN, checks.experts_in_every_layer),
    ),
    "lfm2_moe": GgufFamily(
        model={**MODEL_NAMES, "model.embedding_norm": "token_embd_norm"},
        layer={
            **_ATTENTION,
            "operator_norm": "attn_norm",
            "ffn_norm": "ffn_norm",
            "self_attn.out_proj": "attn_output",
            "self_attn.q_layernorm": "attn_q_norm",
            "self_attn.k_layernorm": "attn_k_norm",
            "conv.conv.weight": Rule(
                ("shortconv.conv.weight",), transforms.squeezed, is_float32=True
            ),
            "conv.in_proj.weight": "shortconv.in_proj.weight",
            "conv.out_proj.weight": "shortconv.out_proj.weight",
            "feed_forward.w1": "ffn_gate",
            "feed_forward.w3": "ffn_up",
            "feed_forward.w2": "ffn_down",
            "feed_forward.gate.weight": "ffn_gate_inp.weight",
            "feed_forward.expert_bias": "exp_probs_b.bias",
        },
        keys=(*_HEADS, keys.short_convolution, keys.leading_dense, keys.gating_function),
        checks=(
            *_PLAIN,
            only("conv_bias", False, None),
            checks.experts_after_dense,
            checks.selection_bias,
            checks.as_wide_as_hidden,
        ),
    ),
    "granitemoe": GgufFamily(
        layer={
            **_NORMS,
            **_ATTENTION,
            **_PAIRED,
            "block_sparse_moe.router.weight": "ffn_gate_inp.weight",
        },
        keys=(*_GROUPED, keys.granite_scales),
        checks=(*_PLAIN, checks.experts_in_every_layer),
    ),
    "ernie4_5_moe": GgufFamily(
        layer={**_NORMS, **_ATTENTION, **_DENSE, **_BIASED_ROUTER, **_SHARED},
        keys=(*_GROUPED, keys.leading_dense, keys.ernie_step, keys.shared_width),
        checks=(
            checks.silu,
            checks.plain_rope,
            only("use_bias", False, None),
            checks.experts_after_dense,
            checks.shared_expert,
        ),
    ),
    "qwen3_next": GgufFamily(
        model=_SHIFTED_MODEL,
        layer={**_ATTENTION, **_SHIFTED_NORMS, **_DELTA_NET, **_ROUTER, **_GATED_SHARED},
        keys=(*_GROUPED, keys.delta_net, keys.shared_width),
        checks=(
            *_PLAIN,
            checks.experts_in_every_layer,
            checks.equal_delta_widths,
            checks.full_or_linear,
        ),
    ),
    "qwen3_5_moe_text": GgufFamily(
        model=_SHIFTED_MODEL,
        layer={**_ATTENTION, **_SHIFTED_NORMS, **_TILED_DELTA_NET, **_ROUTER, **_GATED_SHARED},
        keys=(*_GROUPED, keys.delta_net, keys.picture_positions, keys.shared_width),
        checks=(*_PLAIN, checks.equal_delta_widths, checks.full_or_linear),
    ),
    "gemma4_text": GgufFamily(
        layer={
            **_ATTENTION,
            **_QK_NORMS,
            **_DENSE,
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
            "post_feedforward_layernorm": "post_ffw_norm",
            "post_feedforward_layernorm_1": "post_ffw_norm_1",
            "post_feedforward_layernorm_2": "post_ffw_norm_2",
            "layer_scalar": "layer_output_scale.weight",
            "router.proj.weight": "ffn_gate_inp.weight",
            "router.scale": "ffn_gate_inp.scale",
            "router.per_expert_scale": "ffn_down_exps.scale",
        },
        keys=(keys.gemma_attention, keys.dense_width, keys.sliding_window),
        checks=(
            checks.tanh_gelu,
            checks.gemma_rope,
            only("attention_bias", False, None),
            only("use_bidirectional_attention", None, "vision"),
        ),
        extra=_gemma_frequencies,
    ),
    "nemotron_h": GgufFamily(
        model={
            "model.embeddings": "token_embd",
            "model.norm_f": "output_norm",
            "lm_head": "output",
        },
        layer={
            "norm": "attn_norm",
            "mixer.in_proj": "ssm_in",
            "mixer.conv1d.weight": Rule(
                ("ssm_conv1d.weight",), transforms.squeezed, is_float32=True
            ),
            "mixer.conv1d.bias": "ssm_conv1d.bias",
            "mixer.dt_bias": "ssm_dt.bias",
            "mixer.A_log": Rule(("ssm_a",), transforms.decay_column, is_float32=True),
            "mixer.D": Rule(("ssm_d",), transforms.column, is_float32=True),
            "mixer.norm.weight": Rule(("ssm_norm.weight",), transforms.grouped, is_float32=True),
            "mixer.out_proj": "ssm_out",
            "mixer.q_proj": "attn_q",
            "mixer.k_proj": "attn_k",
            "mixer.v_proj": "attn_v",
            "mixer.o_proj": "attn_output",
            "mixer.gate.weight": "ffn_gate_inp.weight",
            "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
            "mixer.fc1_latent_proj": "ffn_latent_down",
            "mixer.fc2_latent_proj": "ffn_latent_up",
            "mixer.shared_experts.up_proj": "ffn_up_shexp",
            "mixer.shared_experts.down_proj": "ffn_down_shexp",
        },
        keys=(keys.mamba, keys.stated_routing, keys.shared_count, keys.shared_width),
        checks=(
            checks.squared_relu,
            checks.no_dense_blocks,
            checks.shared_expert,
            only("mlp_bias", False, None),
            only("attention_bias", False, None),
            only("use_bias", False, None),
            only("mamba_proj_bias", False, None),
        ),
    ),
}
"""model_type -> its table; every family whose `Family.gguf_arch` is set has one."""
