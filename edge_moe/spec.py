"""What a checkpoint is: `ModelSpec.from_config` does all the guessing at config.json's keys.

Everything after it reads plain, typed, frozen fields. No torch, no weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_moe.arch import FAMILIES, Family
from edge_moe.errors import SpecError

# letters used in shape comments: E experts, K top_k, H hidden_size, I expert_width, T tokens


@dataclass(frozen=True)
class RouterSpec:
    """How a token's experts are chosen and weighted."""

    score_function: str
    """`softmax` over all experts before top_k, or `sigmoid` per expert."""
    renormalises: bool
    """The chosen weights are divided by their sum."""
    has_selection_bias: bool
    """A correction bias decides the choice, but not the weight."""
    num_groups: int
    """Experts lie in this many equal groups; 1 means no group limit."""
    top_groups: int
    """Only experts of the best `top_groups` groups can be chosen."""
    scale: float
    """Factor on the final weights."""

    def describe(self) -> str:
        """One line for people: `softmax, top-2 renormalised`."""
        parts = [self.score_function]
        if self.has_selection_bias:
            parts.append("selection bias")
        if self.num_groups > 1:
            parts.append(f"{self.top_groups} of {self.num_groups} groups")
        parts.append("renormalised" if self.renormalises else "not renormalised")
        if self.scale != 1.0:
            parts.append(f"scaled by {self.scale:g}")
        return ", ".join(parts)


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and names of one MoE checkpoint."""

    model_type: str
    architecture: str
    num_layers: int
    moe_layer_ids: tuple[int, ...]
    """Decoder layers whose MLP is a mixture of experts, ascending."""
    num_experts: int
    top_k: int
    hidden_size: int
    expert_width: int
    """Inner width I of a routed expert: gate_proj and up_proj are [I, H], down_proj is [H, I]."""
    num_shared_experts: int
    vocab_size: int
    num_attention_heads: int
    num_kv_heads: int
    query_width: int
    """Query values per token: attention heads x head width."""
    kv_key_width: int
    """Key values that transformers caches per token and layer: kv heads x head width."""
    kv_value_width: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    """`bfloat16`, `float16` or `float32`: the dtype that config.json states."""
    hidden_act: str
    router: RouterSpec

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layer_ids)

    @property
    def expert_weights(self) -> int:
        """Number of weights in one routed expert (gate_proj + up_proj + down_proj)."""
        return 3 * self.hidden_size * self.expert_width

    def kv_bytes_per_token(self, itemsize_bytes: int) -> int:
        """KV cache bytes that one token takes over all layers."""
        return self.num_layers * (self.kv_key_width + self.kv_value_width) * itemsize_bytes

    def moe_prefix(self, layer_id: int) -> str:
        """Checkpoint prefix of layer `layer_id`'s MoE block, without a trailing dot."""
        return self.family.moe_prefix.format(layer=layer_id)

    def moe_module(self, layer_id: int) -> str:
        """Path of the MoE block inside the transformers model."""
        return self.family.moe_module.format(layer=layer_id)

    def expert_tensor_names(self, layer_id: int, expert_id: int) -> tuple[str, str, str]:
        """Names of (gate_proj [I, H], up_proj [I, H], down_proj [H, I]) stored one by one."""
        gate, up, down = self.family.projections
        prefix = f"{self.moe_prefix(layer_id)}.experts.{expert_id}"
        return f"{prefix}.{gate}.weight", f"{prefix}.{up}.weight", f"{prefix}.{down}.weight"

    def fused_tensor_names(self, layer_id: int) -> tuple[str, str]:
        """Names of (gate_up_proj [E, 2I, H], down_proj [E, H, I]) of stacked experts."""
        prefix = f"{self.moe_prefix(layer_id)}.experts"
        return f"{prefix}.gate_up_proj", f"{prefix}.down_proj"

    def router_tensor_names(self, layer_id: int) -> tuple[str, ...]:
        """Tensors with one row per expert, to be sliced when experts are dropped."""
        family = self.family
        names = family.router_tensors
        if self.router.has_selection_bias:
            names += family.optional_router_tensors
        return tuple(f"{self.moe_prefix(layer_id)}.{name}" for name in names)

    def module_name(self, tensor_name: str) -> str:
        """The name that transformers gives a dense tensor of the checkpoint."""
        on_disk, in_memory = self.family.moe_prefix, self.family.moe_module
        if on_disk == in_memory:
            return tensor_name
        for layer_id in self.moe_layer_ids:
            prefix = on_disk.format(layer=layer_id) + "."
            if tensor_name.startswith(prefix):
                return in_memory.format(layer=layer_id) + "." + tensor_name[len(prefix) :]
        return tensor_name

    @classmethod
    def from_file(cls, path: Path) -> ModelSpec:
        """Read `config.json`.

        Raises:
            SpecError: the file is missing, not JSON, or not a known MoE architecture.
        """
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SpecError(
                f"{path} does not exist: MODEL must be a folder with config.json and safetensors"
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise SpecError(
                f"{path} is not readable JSON ({error}): download the file again"
            ) from None
        if not isinstance(config, dict):
            raise SpecError(f"{path} holds no JSON object: download the file again")
        return cls.from_config(config, source=str(path))

    @classmethod
    def from_config(cls, config: dict[str, Any], source: str = "config.json") -> ModelSpec:
        """All guessing at Hugging Face keys happens here.

        Raises:
            SpecError: unknown architecture, a missing key or a value out of range.
        """
        read = _ConfigReader(config, source)
        model_type = str(config.get("model_type"))
        if model_type not in FAMILIES:
            raise SpecError(
                f"{source}: architecture {model_type!r} is not supported; "
                f"supported are {', '.join(sorted(FAMILIES))}"
            )
        family = FAMILIES[model_type]
        num_layers = read.count("num_hidden_layers")
        num_experts = read.count(*family.num_experts_keys)
        top_k = read.count("num_experts_per_tok")
        if top_k > num_experts:
            raise SpecError(
                f"{source}: num_experts_per_tok is {top_k} but there are {num_experts} experts"
            )
        heads, kv_heads, head_width = _heads(read, model_type)
        key_width, value_width = _kv_widths(read, model_type)
        return cls(
            model_type=model_type,
            architecture=family.architecture,
            num_layers=num_layers,
            moe_layer_ids=_moe_layer_ids(config, model_type, num_layers, source),
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=read.count("hidden_size"),
            expert_width=read.count(*family.config_expert_width_keys),
            num_shared_experts=_num_shared_experts(config, model_type),
            vocab_size=read.count("vocab_size"),
            num_attention_heads=heads,
            num_kv_heads=kv_heads,
            query_width=heads * head_width,
            kv_key_width=key_width,
            kv_value_width=value_width,
            max_position_embeddings=read.count("max_position_embeddings", default=4096),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            dtype=_dtype(config, source),
            hidden_act=str(config.get("hidden_act", "silu")),
            router=_router(config, family, num_experts, top_k, source),
        )


class _ConfigReader:
    """Reads positive integers under any of several keys, with errors that name the key."""

    def __init__(self, config: dict[str, Any], source: str) -> None:
        self._config = config
        self._source = source

    def count(self, *keys: str, default: int | None = None) -> int:
        for key in keys:
            value = self._config.get(key)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise SpecError(f"{self._source}: {key} is {value!r}, expected a positive integer")
            return value
        if default is not None:
            return default
        raise SpecError(f"{self._source}: none of the keys {', '.join(keys)} is present")


def _heads(read: _ConfigReader, model_type: str) -> tuple[int, int, int]:
    """(attention heads, key and value heads, width of a query or key head)."""
    heads = read.count("num_attention_heads")
    if model_type == "deepseek_v3":  # transformers caches the expanded keys and values
        parts = ("qk_nope_head_dim", 128), ("qk_rope_head_dim", 64)
        return heads, heads, sum(read.count(key, default=default) for key, default in parts)
    kv_heads = read.count("num_key_value_heads", default=heads)
    return heads, kv_heads, read.count("head_dim", default=read.count("hidden_size") // heads)


def _kv_widths(read: _ConfigReader, model_type: str) -> tuple[int, int]:
    """(key, value) widths that transformers caches per token and layer."""
    _, kv_heads, head_width = _heads(read, model_type)
    if model_type == "deepseek_v3":
        return kv_heads * head_width, kv_heads * read.count("v_head_dim", default=128)
    return kv_heads * head_width, kv_heads * head_width


def _moe_layer_ids(
    config: dict[str, Any], model_type: str, num_layers: int, source: str
) -> tuple[int, ...]:
    if model_type == "deepseek_v3":
        first = int(config.get("first_k_dense_replace") or 0)
        layer_ids = tuple(range(first, num_layers))
    else:
        step = int(config.get("decoder_sparse_step") or 1)
        dense = set(config.get("mlp_only_layers") or ())
        layer_ids = tuple(
            layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0
        )
    if not layer_ids:
        raise SpecError(f"{source}: no layer is a mixture of experts; edge-moe needs a MoE model")
    return layer_ids


def _num_shared_experts(config: dict[str, Any], model_type: str) -> int:
    if model_type == "qwen2_moe":
        return 1 if config.get("shared_expert_intermediate_size") else 0
    if model_type == "deepseek_v3":
        return int(config.get("n_shared_experts") or 0)
    return 0


def _dtype(config: dict[str, Any], source: str) -> str:
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise SpecError(
            f"{source}: the checkpoint is already quantised ({method}); "
            "give edge-moe the original bf16, f16 or f32 checkpoint"
        )
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise SpecError(f"{source}: dtype is {dtype!r}, expected bfloat16, float16 or float32")
    return dtype


def _router(
    config: dict[str, Any], family: Family, num_experts: int, top_k: int, source: str
) -> RouterSpec:
    num_groups = int(config.get("n_group") or 1)
    top_groups = int(config.get("topk_group") or 1)
    if num_experts % num_groups:
        raise SpecError(
            f"{source}: {num_experts} experts do not divide into n_group={num_groups} groups"
        )
    if top_groups * (num_experts // num_groups) < top_k:
        raise SpecError(
            f"{source}: topk_group={top_groups} groups hold fewer than top_k={top_k} experts"
        )
    norm = config.get("norm_topk_prob")
    renormalises = family.norm_topk_default if norm is None else bool(norm)
    return RouterSpec(
        score_function=family.score_function,
        renormalises=family.always_renormalises or renormalises,
        has_selection_bias=bool(family.optional_router_tensors),
        num_groups=num_groups,
        top_groups=top_groups,
        scale=float(config.get("routed_scaling_factor") or 1.0),
    )
