"""config.json -> the key-value part of a GGUF file, in the keys of llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_moe import __version__
from edge_moe.converters.gguf_tokenizer import GgufVocabulary
from edge_moe.errors import TargetError
from edge_moe.plan import Plan
from edge_moe.spec import ModelSpec

_QUANTIZATION_VERSION = 2
# llama.h's llama_ftype: a label for people, taken from the form that most experts have
FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q8_0": 7,
    "q2_k": 10,
    "q3_k": 12,
    "q4_k": 15,
    "q5_k": 17,
    "q6_k": 18,
    "bf16": 32,
    "tq1_0": 36,
    "tq2_0": 37,
    "q2_0": 41,
}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def check_config(spec: ModelSpec, config: dict[str, Any]) -> None:
    """Refuse what llama.cpp's graph of this architecture does not compute.

    Raises:
        TargetError: names the key of config.json and its value.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"  # the older key
    heads, kv_heads = spec.num_attention_heads, config.get("num_key_value_heads")
    has_all_heads = kv_heads in (None, heads)
    unsupported = {
        "hidden_act": spec.hidden_act != "silu",
        "rope_parameters.rope_type": rope_type != "default",
        "use_sliding_window": bool(config.get("use_sliding_window")),
        "clip_qkv": config.get("clip_qkv") is not None,
        "attention_bias": bool(config.get("attention_bias")),
        "num_key_value_heads": spec.model_type == "olmoe" and not has_all_heads,
    }
    for key, is_unsupported in unsupported.items():
        if is_unsupported:
            value = rope_type if key.endswith("rope_type") else config.get(key)
            raise TargetError(
                f"target gguf: llama.cpp's {spec.family.gguf_arch} has no {key}={value!r}: "
                "use --target native"
            )
    if spec.num_moe_layers != spec.num_layers:
        raise TargetError(
            f"target gguf: llama.cpp's {spec.family.gguf_arch} has experts in every layer, this "
            f"checkpoint in {spec.num_moe_layers} of {spec.num_layers}: use --target native"
        )


def add_metadata(
    writer: Any, plan: Plan, spec: ModelSpec, config: dict[str, Any], name: str
) -> None:
    """Model keys; the architecture's own prefix is added by `writer` (a gguf.GGUFWriter)."""
    heads = spec.num_attention_heads
    kv_heads = config.get("num_key_value_heads") or heads
    kept = plan.kept(plan.forms[0])
    writer.add_type("model")
    writer.add_name(name)
    writer.add_string("edge_moe.version", __version__)
    writer.add_string("edge_moe.source_fingerprint", plan.model_fingerprint)
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(_number(config, "intermediate_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(spec.kv_key_width // kv_heads)
    writer.add_value_length(spec.kv_value_width // kv_heads)
    writer.add_layer_norm_rms_eps(_number(config, "rms_norm_eps"))
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_expert_count(len(kept))
    writer.add_expert_used_count(spec.top_k)
    if spec.model_type != "olmoe":  # whose feed_forward_length is the expert width
        writer.add_expert_feed_forward_length(spec.expert_width)
    writer.add_file_type(_file_type(plan))
    writer.add_quantization_version(_QUANTIZATION_VERSION)


def add_vocabulary(writer: Any, vocabulary: GgufVocabulary) -> None:
    """Tokenizer keys."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types)
    # llama.cpp insists on the key and gguf writes no empty array: an empty merge merges nothing
    writer.add_token_merges(vocabulary.merges or [""])
    for kind, token_id in vocabulary.special_ids.items():
        getattr(writer, f"add_{kind}_token_id")(token_id)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _number(config: dict[str, Any], key: str) -> Any:
    value = config.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise TargetError(f"config.json: {key} is {value!r}, target gguf needs a positive number")
    return value


def _rope_theta(config: dict[str, Any]) -> float:
    """transformers 5 keeps it under `rope_parameters`, older files at the top."""
    nested = config.get("rope_parameters") or {}
    return float(_number(nested if "rope_theta" in nested else config, "rope_theta"))


def _file_type(plan: Plan) -> int:
    forms = [row[plan.kept(row)[0]] for row in plan.forms]
    return FILE_TYPES[max(sorted(set(forms)), key=forms.count)]
