"""What a checkpoint is: `ModelSpec.from_config` does all the guessing at config.json's keys.

Everything after it reads plain, typed, frozen fields. No torch, no weights.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_moe.arch import Family
from edge_moe.config_reader import TEXT_CONFIG, ConfigReader, read_config, text_config
from edge_moe.errors import InputError, SpecError
from edge_moe.families import COMPOSITES, FAMILIES
from edge_moe.router_spec import RouterSpec, read_router

_ROOT, _NESTED_ROOT = "model.", "model.language_model."
_HEAD = "lm_head.weight"
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""Tables that old files hold and transformers computes."""
_MOST_LAYERS = 10_000
_LAYER_NUMBER = re.compile(r"\blayers\.(\d+)\.")

GGUF_PREFIX = "gguf:"
"""`ModelSpec.model_type` of a GGUF file is this and llama.cpp's architecture: `gguf:qwen3moe`."""

# letters used in shape comments: E experts, K top_k, H hidden_size, I expert_width, T tokens


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
    latent_width: int = 0
    """Inputs and outputs of a routed expert, where they are projections of the hidden state."""
    has_module_names: bool = False
    """The checkpoint names MoE tensors as transformers does, not as the family's own files do."""
    is_nested: bool = False
    """The language model is part of a larger one: its tensors lie under `model.language_model.`,
    its values under `text_config`."""
    fewest_experts: int = 1
    """A layer keeps at least this many, whatever top_k is."""
    num_sliding_layers: int = 0
    """Layers that cache the keys and values of `sliding_window` tokens only."""
    sliding_window: int = 0
    sliding_kv_width: int = 0
    """Keys and values of one token in such a layer; 0 where it is as wide as the others."""
    num_state_layers: int = 0
    """Layers that keep a fixed state per sequence, or nothing, instead of keys and values."""
    state_values: int = 0
    """Values in the states of all those layers."""
    state_workspace: int = 0
    """float32 values per token that such a layer holds at its largest moment."""
    onnx_state_workspace: int = 0
    """The same in onnxruntime."""
    holds_scores: bool = False
    """Attention keeps the scores of all heads and every token at once."""
    logit_divisor: float = 1.0
    """What the output matrix gives is divided by this."""
    logit_softcap: float = 0.0
    """Logits z become c tanh(z / c); 0 leaves them."""
    is_gateless: bool = False
    """Of a GGUF file: experts have no gate_proj."""

    @property
    def is_gguf(self) -> bool:
        """The model is a GGUF file: there is no `family`, and tensors have llama.cpp's names."""
        return self.model_type.startswith(GGUF_PREFIX)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def require_plain_blocks(self, what: str) -> None:
        """Refuse `what` for a family whose MoE blocks it was not written for.

        Raises:
            InputError: names the family.
        """
        if not self.family.has_plain_blocks:
            raise InputError(
                f"{what} does not know the MoE blocks of {self.model_type!r}: use `edge-moe plan` "
                "and `edge-moe build`, which do"
            )

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layer_ids)

    @property
    def expert_weights(self) -> int:
        """Number of weights in one routed expert (gate_proj + up_proj + down_proj)."""
        return (2 + self.has_gate) * self.expert_hidden * self.expert_width

    @property
    def expert_matrix_shapes(self) -> tuple[tuple[int, int], ...]:
        """[rows, columns] of gate_proj, where there is one, up_proj and down_proj."""
        hidden, width = self.expert_hidden, self.expert_width
        return ((width, hidden),) * (1 + self.has_gate) + ((hidden, width),)

    @property
    def has_gate(self) -> bool:
        """An expert multiplies gate_proj's and up_proj's outputs; else it has no gate_proj."""
        return not self.is_gateless if self.is_gguf else self.family.has_gate

    @property
    def expert_hidden(self) -> int:
        """Width of what a routed expert takes and gives: hidden_size, or a latent one."""
        return self.latent_width or self.hidden_size

    @property
    def inner_rows(self) -> int:
        """Rows of gate_proj and up_proj together: 2I, or I without a gate."""
        return (1 + self.has_gate) * self.expert_width

    @property
    def expert_shape(self) -> tuple[int, int, bool]:
        """(H, I, whether there is a gate): what the arithmetic in `edge_moe.formats` asks for."""
        return self.expert_hidden, self.expert_width, self.has_gate

    def kv_bytes_per_token(self, itemsize_bytes: int) -> int:
        """KV cache bytes that one more token takes, once every sliding window is full."""
        num_full = self.num_layers - self.num_sliding_layers - self.num_state_layers
        return num_full * (self.kv_key_width + self.kv_value_width) * itemsize_bytes

    def kv_bytes(self, context_tokens: int, itemsize_bytes: int) -> int:
        """Bytes that `context_tokens` tokens leave behind in all layers."""
        window = min(context_tokens, self.sliding_window)
        width = self.sliding_kv_width or self.kv_key_width + self.kv_value_width
        sliding = self.num_sliding_layers * width * window
        growing = context_tokens * self.kv_bytes_per_token(itemsize_bytes)
        return growing + (sliding + self.state_values) * itemsize_bytes

    def unwindowed_kv_bytes(self, context_tokens: int, itemsize_bytes: int) -> int:
        """The same where sliding layers hold the whole context, too."""
        whole = replace(self, sliding_window=context_tokens)
        return whole.kv_bytes(context_tokens, itemsize_bytes)

    def layer_prefix(self, layer_id: int) -> str:
        """Checkpoint prefix of everything in layer `layer_id`, with its trailing dot."""
        root = self._outer_name(self.family.embedding.partition(".")[0] + ".")
        return f"{self._on_disk(root)}layers.{layer_id}."

    def moe_prefix(self, layer_id: int) -> str:
        """Checkpoint prefix of layer `layer_id`'s MoE block, without a trailing dot."""
        if self.has_module_names:
            return self._on_disk(self.moe_module(layer_id))
        return self._on_disk(self.family.moe_prefix.format(layer=layer_id))

    def moe_module(self, layer_id: int) -> str:
        """Path of the MoE block inside the transformers model."""
        return self.family.moe_module.format(layer=layer_id)

    def expert_tensor_names(self, layer_id: int, expert_id: int) -> tuple[str, ...]:
        """Names of gate_proj [I, H], where there is one, up_proj [I, H] and down_proj [H, I],
        stored one by one."""
        prefix = f"{self.moe_prefix(layer_id)}.experts.{expert_id}"
        return tuple(f"{prefix}.{name}.weight" for name in self.family.projections)

    def fused_tensor_names(self, layer_id: int) -> tuple[str, str]:
        """Names of (gate_up_proj [E, 2I, H], down_proj [E, H, I]) of stacked experts."""
        first = "gate_up_proj" if self.has_gate else "up_proj"
        module_names = f"experts.{first}", "experts.down_proj"
        names = module_names if self.has_module_names else self.family.stacked
        return f"{self.moe_prefix(layer_id)}.{names[0]}", f"{self.moe_prefix(layer_id)}.{names[1]}"

    def router_tensor_names(self, layer_id: int) -> tuple[str, ...]:
        """Tensors with one row per expert, to be sliced when experts are dropped."""
        prefix = self.moe_prefix(layer_id)
        return tuple(f"{prefix}.{name}" for name in self._router_tensors)

    def router_module_names(self, layer_id: int) -> tuple[str, ...]:
        """The same tensors by their name under the MoE block of transformers."""
        prefix = f"{self.moe_module(layer_id)}."
        names = self.router_tensor_names(layer_id)
        return tuple(self.module_name(name).removeprefix(prefix) for name in names)

    @property
    def _router_tensors(self) -> tuple[str, ...]:
        """As the checkpoint names them under the MoE block; the router's matrix is first."""
        family = self.family
        names = family.router_tensors
        if self.router.has_selection_bias:
            names += (family.selection_bias,)
        if self.has_module_names:
            return tuple(_renamed(name, family.block_renames) for name in names)
        return names

    def with_names_of(self, tensor_names: Container[str]) -> ModelSpec:
        """This spec, naming MoE tensors as the checkpoint that holds `tensor_names` does.

        transformers' `save_pretrained(save_original_format=False)` writes its own module names.
        """
        renamed = replace(self, has_module_names=True)
        gate_up_name, _ = renamed.fused_tensor_names(self.moe_layer_ids[0])
        return renamed if gate_up_name in tensor_names else self

    def module_name(self, tensor_name: str) -> str:
        """The name that transformers gives a dense tensor of the checkpoint."""
        family = self.family
        if self.is_nested and tensor_name.startswith(_NESTED_ROOT):
            tensor_name = _ROOT + tensor_name.removeprefix(_NESTED_ROOT)
        if self.has_module_names:
            return tensor_name
        match = _LAYER_NUMBER.search(tensor_name)
        if match is not None and int(match.group(1)) in self.moe_layer_ids:
            layer_id = int(match.group(1))
            prefix = family.moe_prefix.format(layer=layer_id) + "."
            if tensor_name.startswith(prefix):
                inner = _renamed(tensor_name.removeprefix(prefix), family.block_renames)
                return f"{self.moe_module(layer_id)}.{inner}"
        return _renamed(tensor_name, family.renames)

    @property
    def embedding_name(self) -> str:
        """The checkpoint's name of the token embeddings [V, H]."""
        return self._on_disk(self._outer_name(self.family.embedding))

    @property
    def head_name(self) -> str:
        """The checkpoint's name of the output matrix [V, H]: a tied one is the embeddings."""
        return self.embedding_name if self.tie_word_embeddings else _HEAD

    def is_tied_head(self, tensor_name: str) -> bool:
        """Whether it is the token embeddings once more, stored as the output matrix."""
        return self.tie_word_embeddings and tensor_name == _HEAD

    @property
    def final_norm_name(self) -> str:
        """The checkpoint's name of the weight of the norm after the last layer."""
        return self._on_disk(self._outer_name(self.family.final_norm))

    def is_part_of_language_model(self, tensor_name: str) -> bool:
        """Whether it is one of the tensors that generate text, not pictures or drafts."""
        roots = (_NESTED_ROOT,) if self.is_nested else (self.family.embedding.split(".")[0] + ".",)
        if self.has_module_names and not self.is_nested:
            roots = (_ROOT,)
        if tensor_name.endswith(_IGNORED_SUFFIX) or self.is_draft(tensor_name):
            return False
        return tensor_name.startswith((*roots, "lm_head."))

    def is_draft(self, tensor_name: str) -> bool:
        """Whether it belongs to multi-token prediction, outside of the numbered layers."""
        return tensor_name.startswith(self.family.draft_prefix)

    def _on_disk(self, name: str) -> str:
        """A name that starts with `model.`, where the checkpoint keeps the language model."""
        if self.is_nested and name.startswith(_ROOT):
            return _NESTED_ROOT + name.removeprefix(_ROOT)
        return name

    def _outer_name(self, name: str) -> str:
        return _renamed(name, self.family.renames) if self.has_module_names else name

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
        family, config, is_nested = _of_language_model(config, source)
        read = ConfigReader(config, source)
        _check_refused(config, family, source)
        num_layers = _num_layers(read)
        num_experts = read.count(*family.num_experts_keys)
        top_k = read.count(*family.top_k_keys)
        if top_k > num_experts:
            raise SpecError(
                f"{source}: {family.top_k_keys[0]} is {top_k} but there are {num_experts} experts: "
                "correct the file or download it again"
            )
        heads, kv_heads, head_width = _heads(read, family)
        key_width, value_width = _kv_widths(read, family)
        memory = family.layer_memory(read, num_layers)
        state_values = family.state_values(read) if family.state_values else 0
        state_workspace = family.state_workspace(read) if family.state_workspace else 0
        in_onnx = family.onnx_state_workspace
        return cls(
            model_type=str(config["model_type"]),
            architecture=family.architecture,
            num_layers=num_layers,
            moe_layer_ids=_moe_layer_ids(read, family, num_layers),
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=read.count("hidden_size"),
            expert_width=read.count(*family.expert_width_keys),
            num_shared_experts=_num_shared_experts(read, family),
            vocab_size=read.count("vocab_size"),
            num_attention_heads=heads,
            num_kv_heads=kv_heads,
            query_width=heads * head_width,
            kv_key_width=key_width,
            kv_value_width=value_width,
            expanded_kv_width=_expanded_kv_width(read, family),
            max_position_embeddings=read.count("max_position_embeddings"),
            tie_word_embeddings=_is_tied(read),
            dtype=_dtype(config, source),
            hidden_act=_activation(config),
            router=read_router(read, config, family, num_experts, top_k),
            is_nested=is_nested,
            latent_width=read.count("moe_latent_size", default=0, least=0),
            fewest_experts=family.fewest_experts,
            num_sliding_layers=memory.count("sliding"),
            sliding_window=read.count("sliding_window") if "sliding" in memory else 0,
            sliding_kv_width=2 * kv_heads * head_width if family.has_global_heads else 0,
            num_state_layers=memory.count("state") + memory.count("none"),
            state_values=state_values * memory.count("state"),
            state_workspace=state_workspace,
            onnx_state_workspace=in_onnx(read) if in_onnx else state_workspace,
            holds_scores=family.holds_scores,
            logit_divisor=read.number("logits_scaling") or 1.0,
            logit_softcap=read.number("final_logit_softcapping"),
        )


def _is_tied(read: ConfigReader) -> bool:
    """LFM2's own files call it `tie_embedding`."""
    return read.flag("tie_embedding", default=read.flag("tie_word_embeddings"))


def _renamed(name: str, renames: Sequence[tuple[str, str]]) -> str:
    for old, new in renames:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _of_language_model(config: dict[str, Any], source: str) -> tuple[Family, dict[str, Any], bool]:
    """(family, values with its defaults, whether the model is a part of a larger one)."""
    is_nested = str(config.get("model_type")) in COMPOSITES and TEXT_CONFIG in config
    if is_nested:
        default = {"model_type": COMPOSITES[str(config["model_type"])]}
        config = {**default, **text_config(config)}
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        known = ", ".join(sorted({*FAMILIES, *COMPOSITES}))
        raise SpecError(
            f"{source}: architecture {model_type!r} is not supported; "
            f"supported are {known}: give a model of one of these"
        )
    family = FAMILIES[model_type]
    return family, {**family.config_defaults, **config}, is_nested


def _check_refused(config: dict[str, Any], family: Family, source: str) -> None:
    for key, handled in family.refused.items():
        if config.get(key) not in handled:
            raise SpecError(
                f"{source}: {family.architecture} with {key}={config.get(key)!r} is not supported, "
                f"only {', '.join(repr(value) for value in handled)}: give another model"
            )


def _activation(config: dict[str, Any]) -> str:
    keys = ("hidden_act", "hidden_activation", "mlp_hidden_act")
    return next((str(config[key]) for key in keys if config.get(key)), "silu")


def _num_layers(read: ConfigReader) -> int:
    pattern = read.items("layers_block_type") or read.text("hybrid_override_pattern")
    num_layers = len(pattern) if pattern else read.count("num_hidden_layers")
    if num_layers > _MOST_LAYERS:
        raise SpecError(
            f"{read.source}: {num_layers} layers are more than the {_MOST_LAYERS} that edge-moe "
            "allows: correct the file or download it again"
        )
    return num_layers


def _heads(read: ConfigReader, family: Family) -> tuple[int, int, int]:
    """(attention heads, key and value heads, width of a query or key head)."""
    heads = read.count("num_attention_heads")
    if family.attention == "latent":
        return heads, heads, read.count("qk_nope_head_dim") + read.count("qk_rope_head_dim")
    kv_heads = read.count("num_key_value_heads", default=heads)
    return heads, kv_heads, read.count("head_dim", default=read.count("hidden_size") // heads)


def _kv_widths(read: ConfigReader, family: Family) -> tuple[int, int]:
    """(key, value) widths that transformers caches per token and layer."""
    _, kv_heads, head_width = _heads(read, family)
    if family.attention == "latent":
        return read.count("kv_lora_rank"), read.count("qk_rope_head_dim")
    if family.has_global_heads:
        kv_heads, head_width = _global_heads(read, kv_heads)
    return kv_heads * head_width, kv_heads * head_width


def _global_heads(read: ConfigReader, kv_heads: int) -> tuple[int, int]:
    """(key and value heads, their width) of Gemma 4's full-attention layers.

    transformers 5 saves them per layer, the original files under keys of their own.
    """
    layers = read.sections("per_layer_config")
    if layers is None:
        width = read.count("global_head_dim", default=512)
        if not read.flag("attention_k_eq_v"):
            return kv_heads, width
        return read.count("num_global_key_value_heads", default=kv_heads), width
    own = layers[0] if layers else read
    width = own.count("head_dim", default=read.count("head_dim"))
    return own.count("num_key_value_heads", default=kv_heads), width


def _expanded_kv_width(read: ConfigReader, family: Family) -> int:
    if family.attention != "latent":
        return 0
    heads, _, head_width = _heads(read, family)
    return heads * (read.count("qk_nope_head_dim") + read.count("v_head_dim") + head_width)


def _moe_layer_ids(read: ConfigReader, family: Family, num_layers: int) -> tuple[int, ...]:
    layer_ids = family.moe_layers(read, num_layers)
    if not layer_ids:
        raise SpecError(
            f"{read.source}: no layer is a mixture of experts; edge-moe needs a MoE model"
        )
    return layer_ids


def _num_shared_experts(read: ConfigReader, family: Family) -> int:
    if family.shared_width_key:
        return min(1, read.count(family.shared_width_key, default=0, least=0))
    if family.shared_count_key:
        return read.count(family.shared_count_key, default=0, least=0)
    return 0


def _dtype(config: dict[str, Any], source: str) -> str:
    if config.get("quantization_config"):
        return "bfloat16"  # what `edge_moe.packed_tensors` makes of packed tensors
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise SpecError(f"{source}: dtype is {dtype!r}, expected bfloat16, float16 or float32")
    return dtype
