"""A dense GGUF file as a dense model: llama.cpp's names and keys back to transformers'.

Tensors are dequantised one at a time: 16-bit types keep their bits, packed ones become float32.
llama.cpp's `llama` wants the rotary pairs of queries and keys beside each other; transformers keeps
them half a head apart. Names and keys are those of src/llama-arch.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from edge_moe.converters.safetensors_writer import TensorEntry
from edge_moe.converters.upcycle.dense_config import DenseConfig, read_dense_config
from edge_moe.converters.upcycle.dense_model import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    DenseModel,
    dense_model,
)
from edge_moe.converters.upcycle.stored_tensor import StoredTensor
from edge_moe.errors import CheckpointError, InputError, MissingExtraError
from edge_moe.files import os_problem
from edge_moe.gguf_header import GgufHeader, GgufTensorInfo
from edge_moe.gguf_keys import GgufKeys
from edge_moe.gguf_model import parts_fingerprint
from edge_moe.gguf_split import read_parts
from edge_moe.gguf_values import read_whole
from edge_moe.tensor_info import FloatArray

_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's architecture -> transformers' model_type; Mistral's files say `llama`."""
_MODEL = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": HEAD}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PAIRED = ("attn_q", "attn_k")
_STRETCHING = ("rope.scaling.factor", "rope.scale_linear")
"""llama.cpp takes the second, of older files, where the first is missing."""
_LOUDNESS = "rope.scaling.attn_factor"
_KEPT_DTYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_TOKENIZER_ALLOWANCE_BYTES = 64 * 2**20


def open_dense_gguf(path: Path) -> DenseModel:
    """The dense model in the GGUF file `path`, or of which it is the first part.

    Raises:
        InputError: another architecture, a mixture of experts, or positions that are scaled or of
            a part of a head.
        SpecError, CheckpointError: a damaged file.
    """
    parts = read_parts(path)
    header = parts[0]
    infos = {info.name: info for part in parts for info in part.tensors}
    config = _config(header, infos)
    tensors = [_tensor(info, config, header) for info in infos.values()]
    return dense_model(
        path,
        config,
        {tensor.name: tensor for tensor in tensors},
        parts_fingerprint(parts),
        _TOKENIZER_ALLOWANCE_BYTES,
        lambda folder: _write_tokenizer(path, folder),
    )


def _config(header: GgufHeader, infos: dict[str, GgufTensorInfo]) -> DenseConfig:
    name, path = header.architecture, header.path
    if header.number("expert_count") or any("_exps" in tensor for tensor in infos):
        raise InputError(
            f"{path} is a mixture of experts already: give `edge-moe plan` this file, or "
            "`edge-moe upcycle` a dense one"
        )
    if name not in _ARCHITECTURES:
        raise InputError(
            f"{path}: the architecture {name!r} cannot be upcycled: give a dense model of "
            f"{', '.join(_ARCHITECTURES)}, or its Hugging Face folder"
        )
    keys = GgufKeys(header)
    heads, hidden = keys.count("attention.head_count"), keys.count("embedding_length")
    head_width = keys.count("attention.key_length", hidden // heads)
    _require_plain_positions(header, infos, head_width)
    epsilon = keys.number("attention.layer_norm_rms_epsilon")
    if epsilon is None:
        raise keys.fail("attention.layer_norm_rms_epsilon", None, "a number")
    values: dict[str, Any] = {
        "model_type": _ARCHITECTURES[name],
        "num_hidden_layers": keys.count("block_count"),
        "hidden_size": hidden,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_width,
        "vocab_size": _embedding(infos, path).shape[0],
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": epsilon,
        "tie_word_embeddings": "output.weight" not in infos,
        "rope_theta": keys.number("rope.freq_base") or 10000.0,
        "hidden_act": "silu",
        **_special_tokens(header),
    }
    return read_dense_config(values, str(path))


def _embedding(infos: dict[str, GgufTensorInfo], path: Path) -> GgufTensorInfo:
    if "token_embd.weight" not in infos:
        raise CheckpointError(f"{path}: 'token_embd.weight' is missing: download the file again")
    return infos["token_embd.weight"]


def _require_plain_positions(
    header: GgufHeader, infos: dict[str, GgufTensorInfo], head_width: int
) -> None:
    """Refuse positions that llama.cpp stretches, or heads that it rotates a part of."""
    scaled = _position_scaling(header, infos)
    if scaled is not None:
        raise InputError(
            f"{header.path}: rotary positions are scaled ({scaled}), of which the file does not "
            "say everything: give the Hugging Face folder that it was made from"
        )
    rotated = GgufKeys(header).count("rope.dimension_count", head_width)
    if rotated != head_width:
        raise InputError(
            f"{header.path}: {header.architecture}.rope.dimension_count is {rotated} of heads "
            f"{head_width} wide, and the target rotates whole heads: give a model that does"
        )


def _position_scaling(header: GgufHeader, infos: dict[str, GgufTensorInfo]) -> str | None:
    """What scales the rotary positions, as the message calls it; None where nothing does.

    As in llama.cpp a factor counts without a type, which is linear then, and 0 is none; a type that
    is said to be none stretches by no factor, but what rotated heads are multiplied with counts.
    """
    if "rope_freqs.weight" in infos:
        return "rope_freqs.weight"
    kind = header.metadata.get(f"{header.architecture}.rope.scaling.type")
    if kind not in (None, "none"):
        return str(kind)
    for key in (_LOUDNESS,) if kind else (*_STRETCHING, _LOUDNESS):
        factor = GgufKeys(header).number(key)
        if factor not in (None, 0.0, 1.0):
            return f"{header.architecture}.{key} is {factor:g}"
    return None


def _special_tokens(header: GgufHeader) -> dict[str, Any]:
    """Ids of the tokens that start, end and pad a text."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {
        key: header.metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()
    }
    return {key: value for key, value in found.items() if isinstance(value, int)}


def _tensor(info: GgufTensorInfo, config: DenseConfig, header: GgufHeader) -> StoredTensor:
    dtype = _KEPT_DTYPES.get(info.type_name, "F32")
    read = partial(read_whole, info)
    name, parts = _hugging_face_name(info.name), info.name.split(".")
    is_paired = header.architecture == "llama" and len(parts) == 4 and parts[2] in _PAIRED
    source = _halved(read, config.head_width) if is_paired else read
    return StoredTensor(TensorEntry(name, dtype, info.shape), source)


def _hugging_face_name(name: str) -> str:
    """transformers' name; llama.cpp's own where there is none, for the message that refuses it."""
    if name in _MODEL:
        return _MODEL[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _LAYER:
        return name
    return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"


def _halved(read: Callable[[], FloatArray], head_width: int) -> Callable[[], FloatArray]:
    """Rows [N D, ...]: rotary pairs beside each other -> D/2 rows apart."""

    def halved() -> FloatArray:
        values = read()
        pairs = values.reshape(-1, head_width // 2, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    return halved


def _write_tokenizer(path: Path, folder: Path) -> None:
    """The tokenizer that transformers makes of the file's vocabulary."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "reading a GGUF file's tokenizer") from None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise InputError(f"{path}: its tokenizer cannot be written: {os_problem(error)}") from None
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path}: transformers makes no tokenizer of it ({reason}): give the Hugging Face "
            "folder that it was made from"
        ) from None
