"""Small GGUF files with random experts of any type, written by the `gguf` package and libggml.

`write_moe` writes just enough for headers, planning and slicing; `requantised` makes a file that
llama.cpp runs out of one that the exporter wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_moe.converters.gguf_metadata import add_vocabulary
from edge_moe.converters.gguf_tokenizer import read_vocabulary
from edge_moe.formats.ggml_library import quantize_chunk
from edge_moe.formats.ggml_types import GGML_TYPES_BY_NAME
from edge_moe.gguf_header import read_gguf_header
from edge_moe.gguf_model import GgufModel

Array = npt.NDArray[Any]


def packed(values: Array, type_name: str) -> npt.NDArray[np.uint8]:
    """[..., W] float32 -> [..., row_bytes] by libggml."""
    kind = GGML_TYPES_BY_NAME[type_name]
    rows = values.reshape(-1, values.shape[-1]).astype(np.float32)
    if type_name == "F32":
        data = rows.view(np.uint8)
    else:
        importance = np.ones(rows.shape[1], np.float32) if "IQ" in type_name else None
        data = quantize_chunk(kind, rows, importance)
    return data.reshape(*values.shape[:-1], -1)


def add(writer: Any, name: str, values: Array, type_name: str = "F32") -> None:
    import gguf

    data = packed(values, type_name)
    raw = gguf.GGMLQuantizationType[type_name]
    writer.add_tensor(name, data, raw_shape=data.shape, raw_dtype=raw)


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_moe(
    path: Path,
    arch: str = "qwen3moe",
    *,
    types: tuple[str, str, str] = ("Q4_K", "Q4_K", "Q6_K"),
    layer_types: Mapping[int, tuple[str, str, str]] | None = None,
    num_layers: int = 2,
    num_experts: int = 4,
    top_k: int = 2,
    width: int = 256,
    merged: bool = False,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Array] | None = None,
    tensor_types: Mapping[str, str] | None = None,
    seed: int = 0,
    split_max_tensors: int = 0,
    file_type: int | None = None,
    licence: str | None = None,
    repo_url: str | None = None,
    size_label: str | None = None,
) -> Path:
    """`keys` are added under the architecture's prefix (None leaves one out), `tensors` as F32
    or as `tensor_types` says.
    """
    import gguf

    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split_max_tensors)
    known: dict[str, Any] = {
        "block_count": num_layers,
        "context_length": 512,
        "embedding_length": width,
        "feed_forward_length": width,
        "expert_feed_forward_length": width,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "expert_count": num_experts,
        "expert_used_count": top_k,
    } | dict(keys or {})
    for key, value in known.items():
        _add_key(writer, f"{arch}.{key}", value)
    if file_type is not None:
        writer.add_file_type(file_type)
    if licence is not None:
        writer.add_license(licence)
    if repo_url is not None:
        writer.add_base_model_repo_url(0, repo_url)
    if size_label is not None:
        writer.add_size_label(size_label)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(64)])
    add(writer, "token_embd.weight", random.normal(size=(64, width)))
    for layer in range(num_layers):
        gate, up, down = (layer_types or {}).get(layer, types)
        prefix = f"blk.{layer}.ffn"
        matrix = random.normal(size=(3, num_experts, width, width)) * 0.1
        add(writer, f"{prefix}_gate_inp.weight", random.normal(size=(num_experts, width)))
        if merged:
            both = np.concatenate([matrix[0], matrix[1]], axis=1)
            add(writer, f"{prefix}_gate_up_exps.weight", both, gate)
        else:
            add(writer, f"{prefix}_gate_exps.weight", matrix[0], gate)
            add(writer, f"{prefix}_up_exps.weight", matrix[1], up)
        add(writer, f"{prefix}_down_exps.weight", matrix[2], down)
        add(writer, f"blk.{layer}.attn_norm.weight", np.ones(width))
    for name, values in (tensors or {}).items():
        add(writer, name, values, (tensor_types or {}).get(name, "F32"))
    finish(writer)
    return path


def _add_key(writer: Any, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def requantised(
    source: Path,
    output: Path,
    types: Mapping[str, str],
    *,
    merged: bool = False,
    split_max_tensors: int = 0,
) -> Path:
    """`source` with every tensor whose name matches a pattern stored in that type.

    `merged` stores gate_proj and up_proj in one tensor. A split file is written beside `output`,
    and its first part returned.
    """
    import gguf

    model, header = GgufModel(source), read_gguf_header(source)
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(output, header.architecture, split_max_tensors=split_max_tensors)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
    for info in header.tensors:
        name, values = info.name, model.read(info.name)
        if merged and "_up_exps" in name:
            continue
        if merged and "_gate_exps" in name:
            other = model.read(name.replace("_gate_exps", "_up_exps"))
            name, values = name.replace("_gate_", "_gate_up_"), np.concatenate([values, other], 1)
        chosen = next((t for p, t in types.items() if re.search(p, name)), None)
        add(writer, name, values, chosen or info.type_name)
    finish(writer)
    return min(output.parent.glob(f"{output.stem}-00001-of-*.gguf"), default=output)


def write_gpt_oss(
    path: Path, tokenizer: Path, expert_type: str = "MXFP4", *, masked: Mapping[int, list[int]]
) -> Path:
    """A random gpt-oss that llama.cpp runs: 2 layers, 8 experts, top-2, biases everywhere.

    The router never chooses the experts `masked` of a layer: their bias is hopeless.
    """
    import gguf

    random = np.random.default_rng(6)
    width, heads, kv_heads, head_width, num_experts = 64, 4, 2, 16, 8
    writer = gguf.GGUFWriter(path, "gpt-oss")
    keys = {
        "block_count": 2,
        "context_length": 512,
        "embedding_length": width,
        "feed_forward_length": width,
        "expert_feed_forward_length": width,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_width,
        "attention.value_length": head_width,
        "attention.sliding_window": 16,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "expert_count": num_experts,
        "expert_used_count": 2,
    }
    for key, value in keys.items():
        _add_key(writer, f"gpt-oss.{key}", value)
    vocabulary = read_vocabulary(tokenizer, 320)
    add_vocabulary(writer, vocabulary)

    def weight(name: str, *shape: int, scale: float = 0.1, type_name: str = "F32") -> None:
        add(writer, name, random.normal(size=shape) * scale, type_name)

    weight("token_embd.weight", 320, width, scale=1.0)
    weight("output.weight", 320, width)
    add(writer, "output_norm.weight", np.ones(width))
    for layer in range(2):
        prefix = f"blk.{layer}"
        add(writer, f"{prefix}.attn_norm.weight", np.ones(width))
        add(writer, f"{prefix}.post_attention_norm.weight", np.ones(width))
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            weight(f"{prefix}.attn_{name}.weight", rows * head_width, width)
            weight(f"{prefix}.attn_{name}.bias", rows * head_width)
        weight(f"{prefix}.attn_output.weight", width, heads * head_width)
        weight(f"{prefix}.attn_output.bias", width)
        weight(f"{prefix}.attn_sinks.weight", heads)
        weight(f"{prefix}.ffn_gate_inp.weight", num_experts, width, scale=0.5)
        bias = random.normal(size=num_experts)
        bias[masked.get(layer, [])] = -1e9
        add(writer, f"{prefix}.ffn_gate_inp.bias", bias)
        for part in ("gate", "up", "down"):
            name = f"{prefix}.ffn_{part}_exps"
            weight(f"{name}.weight", num_experts, width, width, scale=0.2, type_name=expert_type)
            weight(f"{name}.bias", num_experts, width)
    finish(writer)
    return path
