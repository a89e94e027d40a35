"""What a checkpoint is: `ModelSpec.from_config` does all the guessing at config.json's keys.

Everything after it reads plain, typed, frozen fields. No torch, no weights.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_moe.arch import FAMILIES, Family
from edge_moe.errors import SpecError
from edge_moe.files import read_json

GGUF_PREFIX = "gguf:"
"""`ModelSpec.model_type` of a GGUF file is this and llama.cpp's architecture: `gguf:qwen3moe`."""

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
    """Key values that transformers caches per token and layer: kv heads x head width, or the
    latent of multi-head latent attention."""
    kv_value_width: int
    """The same of values; with latent attention the key's rotary part."""
    expanded_kv_width: int
    """Values per cached token that latent attention expands into, for one layer at a time: keys
    and values of all heads, and the keys again with their rotary part. 0 for other attention."""
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    """`bfloat16`, `float16` or `float32`: the dtype that config.json states."""
    hidden_act: str
    router: RouterSpec
    has_module_names: bool = False
    """The checkpoint names MoE tensors as transformers does, not as the family's own files do."""
    fewest_experts: int = 1
    """A layer keeps at least this many, whatever top_k is."""

    @property
    def is_gguf(self) -> bool:
        """The model is a GGUF file: there is no `family`, and tensors have llama.cpp's names."""
        return self.model_type.startswith(GGUF_PREFIX)

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
        if self.has_module_names:
            return self.moe_module(layer_id)
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

    def with_names_of(self, tensor_names: Container[str]) -> ModelSpec:
        """This spec, naming MoE tensors as the checkpoint that holds `tensor_names` does.

        transformers' `save_pretrained(save_original_format=False)` writes its own module names.
        """
        renamed = replace(self, has_module_names=True)
        gate_up_name, _ = renamed.fused_tensor_names(self.moe_layer_ids[0])
        return renamed if gate_up_name in tensor_names else self

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
        return cls.from_config(read_config(path), source=str(path))

    @classmethod
    def from_config(cls, config: dict[str, Any], source: str = "config.json") -> ModelSpec:
        """All guessing at Hugging Face keys happens here.

        Raises:
            SpecError: unknown architecture, a missing key or a value out of range.
        """
        model_type = str(config.get("model_type"))
        if model_type not in FAMILIES:
            raise SpecError(
                f"{source}: architecture {model_type!r} is not supported; "
                f"supported are {', '.join(sorted(FAMILIES))}: give a model of one of these"
            )
        family = FAMILIES[model_type]
        config = {**family.config_defaults, **config}
        read = ConfigReader(config, source)
        num_layers = read.count("num_hidden_layers")
        num_experts = read.count(*family.num_experts_keys)
        top_k = read.count("num_experts_per_tok")
        if top_k > num_experts:
            raise SpecError(
                f"{source}: num_experts_per_tok is {top_k} but there are {num_experts} experts: "
                "correct the file or download it again"
            )
        heads, kv_heads, head_width = _heads(read, model_type)
        key_width, value_width = _kv_widths(read, model_type)
        return cls(
            model_type=model_type,
            architecture=family.architecture,
            num_layers=num_layers,
            moe_layer_ids=_moe_layer_ids(read, config, model_type, num_layers),
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=read.count("hidden_size"),
            expert_width=read.count(*family.config_expert_width_keys),
            num_shared_experts=_num_shared_experts(read, model_type),
            vocab_size=read.count("vocab_size"),
            num_attention_heads=heads,
            num_kv_heads=kv_heads,
            query_width=heads * head_width,
            kv_key_width=key_width,
            kv_value_width=value_width,
            expanded_kv_width=_expanded_kv_width(read, model_type),
            max_position_embeddings=read.count("max_position_embeddings"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            dtype=_dtype(config, source),
            hidden_act=str(config.get("hidden_act", "silu")),
            router=_router(read, config, family, num_experts, top_k),
            fewest_experts=family.fewest_experts,
        )


def read_config(path: Path) -> dict[str, Any]:
    """The values of `config.json`.

    Raises:
        SpecError: the file is missing, not readable or not a JSON object.
    """
    missing = f"{path} does not exist: MODEL must be a folder with config.json and safetensors"
    config = read_json(path, SpecError, missing=missing, damaged="download the file again")
    if not isinstance(config, dict):
        raise SpecError(f"{path} holds no JSON object: download the file again")
    return config


class ConfigReader:
    """Reads positive integers under any of several keys, with errors that name the key."""

    def __init__(self, config: dict[str, Any], source: str) -> None:
        self._config = config
        self.source = source

    def count(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """The integer under the first of `keys` that has a value.

        Raises:
            SpecError: no value and no default, or one that is no integer of at least `least`.
        """
        for key in keys:
            value = self._config.get(key)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SpecError(
                    f"{self.source}: {key} is {value!r}, expected an integer of at least {least}: "
                    "correct the file or download it again"
                )
            return value
        if default is not None:
            return default
        names = f"the key {keys[0]}" if len(keys) == 1 else f"none of the keys {', '.join(keys)}"
        raise SpecError(
            f"{self.source}: {names} has {'no' if len(keys) == 1 else 'a'} value: "
            "add it or download the file again"
        )


def _heads(read: ConfigReader, model_type: str) -> tuple[int, int, int]:
    """(attention heads, key and value heads, width of a query or key head)."""
    heads = read.count("num_attention_heads")
    if model_type == "deepseek_v3":
        return heads, heads, read.count("qk_nope_head_dim") + read.count("qk_rope_head_dim")
    kv_heads = read.count("num_key_value_heads", default=heads)
    return heads, kv_heads, read.count("head_dim", default=read.count("hidden_size") // heads)


def _kv_widths(read: ConfigReader, model_type: str) -> tuple[int, int]:
    """(key, value) widths that transformers caches per token and layer."""
    _, kv_heads, head_width = _heads(read, model_type)
    if model_type == "deepseek_v3":
        return read.count("kv_lora_rank"), read.count("qk_rope_head_dim")
    return kv_heads * head_width, kv_heads * head_width


def _expanded_kv_width(read: ConfigReader, model_type: str) -> int:
    if model_type != "deepseek_v3":
        return 0
    heads, _, head_width = _heads(read, model_type)
    return heads * (read.count("qk_nope_head_dim") + read.count("v_head_dim") + head_width)


def _moe_layer_ids(
    read: ConfigReader, config: dict[str, Any], model_type: str, num_layers: int
) -> tuple[int, ...]:
    if model_type == "deepseek_v3":
        first = read.count("first_k_dense_replace", default=0, least=0)
        layer_ids = tuple(range(first, num_layers))
    else:
        step = read.count("decoder_sparse_step", default=1)
        dense = config.get("mlp_only_layers") or ()
        if not isinstance(dense, list | tuple):
            raise SpecError(
                f"{read.source}: mlp_only_layers is {dense!r}, expected a list of layer numbers: "
                "correct the file or download it again"
            )
        layer_ids = tuple(
            layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0
        )
    if not layer_ids:
        raise SpecError(
            f"{read.source}: no layer is a mixture of experts; edge-moe needs a MoE model"
        )
    return layer_ids


def _num_shared_experts(read: ConfigReader, model_type: str) -> int:
    if model_type == "qwen2_moe":
        return min(1, read.count("shared_expert_intermediate_size", default=0, least=0))
    if model_type == "deepseek_v3":
        return read.count("n_shared_experts", default=0, least=0)
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
    read: ConfigReader, config: dict[str, Any], family: Family, num_experts: int, top_k: int
) -> RouterSpec:
    num_groups = read.count("n_group", default=1)
    top_groups = read.count("topk_group", default=1)
    scale = config.get("routed_scaling_factor")
    if scale is not None and (not isinstance(scale, int | float) or not scale > 0):
        raise SpecError(
            f"{read.source}: routed_scaling_factor is {scale!r}, expected a number above 0: "
            "correct the file or download it again"
        )
    if num_experts % num_groups:
        raise SpecError(
            f"{read.source}: {num_experts} experts do not divide into n_group={num_groups} groups: "
            "correct the file or download it again"
        )
    if top_groups * (num_experts // num_groups) < top_k:
        raise SpecError(
            f"{read.source}: topk_group={top_groups} groups hold fewer than top_k={top_k} experts: "
            "correct the file or download it again"
        )
    return RouterSpec(
        score_function=family.score_function,
        renormalises=family.always_renormalises or bool(config.get("norm_topk_prob")),
        has_selection_bias=bool(family.optional_router_tensors),
        num_groups=num_groups,
        top_groups=top_groups,
        scale=1.0 if scale is None else float(scale),
    )
