"""A dense checkpoint as named tensors, one in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_moe.checkpoint import checkpoint_fingerprint, read_all_headers
from edge_moe.config_reader import CONFIG_NAME, read_config
from edge_moe.converters.sidecar import copy_sidecar, sidecar_bytes
from edge_moe.converters.slicing import FORM_OF_DTYPE
from edge_moe.converters.upcycle.dense_config import DenseConfig, read_dense_config
from edge_moe.converters.upcycle.stored_tensor import StoredTensor, from_source
from edge_moe.errors import CheckpointError, InputError
from edge_moe.gguf_split import is_gguf_name

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_QKV_BIASES = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
_IGNORED = ("rotary_emb.inv_freq",)
EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class DenseModel:
    """A dense model: names are those of transformers' Llama and Qwen classes."""

    location: Path
    config: DenseConfig
    tensors: Mapping[str, StoredTensor]
    has_qkv_bias: bool
    fingerprint: str
    """Equal for equal files."""
    sidecar_bytes: int
    """Size of what `copy_sidecar` writes."""
    copy_sidecar: Callable[[Path], None]
    """Write tokenizer, templates, generation settings and legal texts into a folder."""

    @property
    def dtype(self) -> str:
        """BF16, F16 or F32: of the matrices, where they have one; else F32, which holds them all.

        Those of GGUF files often differ: packed ones become F32.
        """
        found = {tensor.dtype for tensor in self.tensors.values() if len(tensor.shape) == 2}
        return found.pop() if len(found) == 1 else "F32"

    def ffn(self, layer_id: int) -> tuple[StoredTensor, StoredTensor, StoredTensor]:
        """(gate_proj [I, H], up_proj [I, H], down_proj [H, I]) of one layer."""
        gate, up, down = (self.tensors[name] for name in ffn_names(layer_id))
        return gate, up, down

    def outside_ffn(self) -> list[StoredTensor]:
        """Everything else, in the order of the source."""
        ffns = {name for layer in range(self.config.num_layers) for name in ffn_names(layer)}
        return [tensor for name, tensor in self.tensors.items() if name not in ffns]


def ffn_names(layer_id: int) -> tuple[str, str, str]:
    """Names of gate_proj, up_proj and down_proj."""
    gate, up, down = (f"model.layers.{layer_id}.mlp.{name}.weight" for name in PROJECTIONS)
    return gate, up, down


def open_dense(path: Path) -> DenseModel:
    """The dense model in the folder or GGUF file `path`. Reads headers only.

    Raises:
        InputError: a mixture of experts, or a model that no MoE architecture holds exactly.
        SpecError, CheckpointError: damaged or incomplete files.
    """
    if path.is_file() and is_gguf_name(path):
        from edge_moe.converters.upcycle.gguf_dense_model import open_dense_gguf

        return open_dense_gguf(path)
    source = str(path / CONFIG_NAME)
    config = read_dense_config(read_config(path / CONFIG_NAME), source)
    infos = read_all_headers(path)
    tensors = {
        name: from_source(info) for name, info in infos.items() if not name.endswith(_IGNORED)
    }
    return dense_model(
        path,
        config,
        tensors,
        checkpoint_fingerprint(path, infos.values()),
        sidecar_bytes(path),
        lambda folder: copy_sidecar(path, folder),
    )


def dense_model(
    location: Path,
    config: DenseConfig,
    tensors: Mapping[str, StoredTensor],
    fingerprint: str,
    num_sidecar_bytes: int,
    copy: Callable[[Path], None],
) -> DenseModel:
    """The model whose `tensors` are as `config` promises.

    Raises:
        InputError: biases that the target has no place for, or tensors of something else.
        CheckpointError: tensors that are missing or have another shape or dtype.
    """
    if config.is_tied:  # a copy of the embedding that transformers does not load
        tensors = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    has_bias = f"model.layers.0.{_QKV_BIASES[0]}" in tensors
    expected = _shapes(config, has_bias)
    _require_known(location, tensors, expected)
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                f"{location}: {name!r}, which config.json promises, is missing: download the "
                "checkpoint again"
            )
        if tensor.shape != shape:
            raise CheckpointError(
                f"{location}: {name!r} has shape {list(tensor.shape)}, config.json implies "
                f"{list(shape)}: one of the two belongs to another model; download both again"
            )
        if tensor.dtype not in FORM_OF_DTYPE:
            raise CheckpointError(
                f"{location}: {name!r} is {tensor.dtype}; edge-moe reads BF16, F16 and F32: give "
                "the unquantised checkpoint"
            )
    return DenseModel(location, config, tensors, has_bias, fingerprint, num_sidecar_bytes, copy)


def _require_known(
    location: Path, tensors: Mapping[str, StoredTensor], expected: Mapping[str, Any]
) -> None:
    """Every tensor has a place in the MoE."""
    for name in tensors:
        if name in expected:
            continue
        found = _LAYER.fullmatch(name)
        if found is not None and found.group(2).endswith(".bias"):
            raise InputError(
                f"{location}: {name!r} is a bias that the target has no place for (it has those "
                "of queries, keys and values in every layer, or none): give a model without it"
            )
        raise InputError(
            f"{location}: {name!r} is no tensor of a plain dense model (one RMS norm before "
            "attention, one before a SwiGLU): give a Llama-, Mistral-, Qwen2- or Qwen3-style one"
        )


def _shapes(config: DenseConfig, has_bias: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor."""
    hidden, width = config.hidden_size, config.ffn_width
    queries, keys = (n * config.head_width for n in (config.num_heads, config.num_kv_heads))
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (width, hidden),
        "mlp.up_proj.weight": (width, hidden),
        "mlp.down_proj.weight": (hidden, width),
    }
    if has_bias:
        layer |= dict(zip(_QKV_BIASES, ((queries,), (keys,), (keys,)), strict=True))
    if config.has_qk_norm:
        layer |= {f"self_attn.{name}_norm.weight": (config.head_width,) for name in "qk"}
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, hidden),
        FINAL_NORM: (hidden,),
    }
    if not config.is_tied:
        shapes[HEAD] = (config.vocab_size, hidden)
    for layer_id in range(config.num_layers):
        shapes |= {f"model.layers.{layer_id}.{name}": shape for name, shape in layer.items()}
    return shapes
