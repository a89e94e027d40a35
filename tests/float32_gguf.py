"""Float32 GGUF files of tiny Hugging Face checkpoints, for every family that llama.cpp calibrates.

Written with the `gguf` package and its own table of tensor names, independent of the exporter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.gguf_metadata import add_vocabulary, read_config
from edge_moe.converters.gguf_tokenizer import read_vocabulary

Array = npt.NDArray[np.float32]

ARCHITECTURES = {
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
    "olmoe": "olmoe",
    "mixtral": "llama",
    "deepseek_v3": "deepseek2",
}
_PROJECTIONS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_MERGED = ("ffn_gate_up_exps", "ffn_down_exps")


def float32_gguf(
    folder: Path, output: Path, *, merged: bool = False, split_max_tensors: int = 0
) -> Path:
    """Write the checkpoint `folder` to the file `output`, everything in float32.

    `merged` stores gate_proj and up_proj in one tensor. A split file is written beside `output`,
    and its first part returned.
    """
    import gguf

    checkpoint, config = Checkpoint(folder), read_config(folder)
    spec = checkpoint.spec
    arch = ARCHITECTURES[spec.model_type]
    writer = gguf.GGUFWriter(output, arch, split_max_tensors=split_max_tensors)
    _add_keys(writer, config, spec.model_type)
    add_vocabulary(writer, read_vocabulary(folder, spec.vocab_size))
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[arch], spec.num_layers)
    for info in checkpoint.dense_tensors:
        for name, values in _dense(info.name, checkpoint.read(info.name), config):
            found = names.get_name(name, (".weight", ".bias"))
            assert found, name
            writer.add_tensor(found, np.ascontiguousarray(values))
    for layer_id in spec.moe_layer_ids:
        experts = [checkpoint.expert(layer_id, e) for e in range(spec.num_experts)]
        stacks = [np.stack(matrices) for matrices in zip(*experts, strict=True)]
        if merged:
            stacks[:2] = [np.concatenate(stacks[:2], axis=1)]
        for name, stack in zip(_MERGED if merged else _PROJECTIONS, stacks, strict=True):
            writer.add_tensor(f"blk.{layer_id}.{name}.weight", stack)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(output.parent.glob(f"{output.stem}-00001-of-*.gguf"), default=output)


def _dense(name: str, values: Array, config: dict[str, Any]) -> list[tuple[str, Array]]:
    """Names and values as llama.cpp's converter leaves them."""
    heads = config["num_attention_heads"]
    if config["model_type"] == "mixtral" and name.endswith(("q_proj.weight", "k_proj.weight")):
        count = heads if "q_proj" in name else config["num_key_value_heads"]
        halves = values.reshape(count, 2, -1, values.shape[1])  # interleaved rotary pairs
        return [(name, halves.swapaxes(1, 2).reshape(values.shape))]
    if name.endswith("kv_b_proj.weight"):
        nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
        both = values.reshape(heads, nope + value, -1)
        keys, kept = both[:, :nope], both[:, nope:]
        stem = name.removesuffix("kv_b_proj.weight")
        return [
            (f"{stem}k_b_proj.weight", keys.swapaxes(1, 2)),
            (f"{stem}v_b_proj.weight", kept),
        ]
    if name.endswith("shared_expert_gate.weight"):
        return [(name, values.reshape(-1))]
    if name.endswith("e_score_correction_bias"):
        return [(name.replace("e_score_correction_bias", "e_score_correction.bias"), values)]
    return [(name, values)]


def _add_keys(writer: Any, config: dict[str, Any], family: str) -> None:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    rope = config.get("rope_parameters") or config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    count = next(
        config[key]
        for key in ("n_routed_experts", "num_experts", "num_local_experts")
        if key in config
    )
    writer.add_expert_count(count)
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if family == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if family == "deepseek_v3":
        _add_deepseek_keys(writer, config)
        return
    writer.add_head_count_kv(kv_heads)
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)


def _add_deepseek_keys(writer: Any, config: dict[str, Any]) -> None:
    """llama.cpp runs latent attention with one key and value head, as wide as the latent."""
    import gguf

    latent, rotary = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rotary)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rotary)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rotary)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if config["n_group"] > 1:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
