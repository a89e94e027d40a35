"""config.json of a dense model: what an existing MoE architecture can hold exactly, or a refusal.

Letters: H hidden_size, N attention heads, D their width, I ffn_width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge_moe.errors import InputError, SpecError
from edge_moe.families import COMPOSITES, FAMILIES

DENSE_MODELS = ("llama", "mistral", "qwen2", "qwen3")
"""Models of one RMS norm before attention, one before a SwiGLU, and nothing else."""
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CARRIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class DenseConfig:
    """Shapes of a dense model, and the values that its MoE takes over."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_width: int
    """Inner width of every feed-forward layer: gate_proj and up_proj are [I, H]."""
    num_heads: int
    num_kv_heads: int
    head_width: int
    vocab_size: int
    max_position_embeddings: int
    is_tied: bool
    """The output matrix is the embedding."""
    has_qk_norm: bool
    """Queries and keys are normalised per head, as in Qwen3."""
    rope: dict[str, Any]
    """rope_theta, rope_type, and what the type asks for."""
    carried: dict[str, Any]
    """Keys that mean the same in the MoE's config.json."""

    @property
    def is_as_wide_as_hidden(self) -> bool:
        """Queries of all heads are as wide as the hidden state."""
        return self.num_heads * self.head_width == self.hidden_size


def read_dense_config(values: dict[str, Any], source: str) -> DenseConfig:
    """The values of a config.json, with the defaults of its model type.

    Raises:
        InputError: a mixture of experts, another kind of model, or values that no MoE architecture
            holds exactly.
        SpecError: transformers refuses the values.
    """
    model_type = str(values.get("model_type", ""))
    _require_dense(values, model_type, source)
    from transformers import CONFIG_MAPPING

    try:
        config: Any = CONFIG_MAPPING[model_type].from_dict(dict(values))
    except Exception as error:  # transformers' validation raises errors of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SpecError(
            f"{source}: transformers refuses it ({reason}): correct the file or download it again"
        ) from None
    found = DenseConfig(
        model_type=model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_width=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_width=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        is_tied=bool(config.tie_word_embeddings),
        has_qk_norm=model_type == "qwen3",
        rope=dict(config.rope_parameters),
        carried={key: getattr(config, key) for key in _CARRIED},
    )
    _require_plain(config, found, source)
    return found


def _require_dense(values: dict[str, Any], model_type: str, source: str) -> None:
    experts = next((key for key in _EXPERT_KEYS if values.get(key)), None)
    if model_type in FAMILIES or model_type in COMPOSITES or experts:
        raise InputError(
            f"{source}: {model_type or 'the model'} is a mixture of experts already"
            f"{f' ({experts}={values[experts]})' if experts else ''}: give `edge-moe plan` this "
            "model, or `edge-moe upcycle` a dense one"
        )
    if model_type not in DENSE_MODELS:
        raise InputError(
            f"{source}: model_type {model_type!r} cannot be upcycled: give a dense model of type "
            f"{', '.join(DENSE_MODELS)}"
        )
    if values.get("quantization_config"):
        raise InputError(
            f"{source}: the weights are quantised (quantization_config): give the 16-bit "
            "checkpoint that it was made from"
        )


def _require_plain(config: Any, found: DenseConfig, source: str) -> None:
    """Refuse what neither target architecture computes."""
    if config.hidden_act not in ("silu", "swish"):
        raise InputError(
            f"{source}: hidden_act is {config.hidden_act!r}, and the experts of a MoE here are "
            "SwiGLUs (silu): give a model with one"
        )
    if getattr(config, "mlp_bias", False):
        raise InputError(
            f"{source}: mlp_bias is true, and experts have no biases: give a model without"
        )
    share = found.rope.get("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise InputError(
            f"{source}: partial_rotary_factor is {share}, and the target rotates whole heads: "
            "give a model that does"
        )
    window = _window(config)
    if window is not None and window < found.max_position_embeddings:
        raise InputError(
            f"{source}: attention has a sliding window of {window} tokens in a context of "
            f"{found.max_position_embeddings}, which the target has not: in a copy of the folder "
            f'set "sliding_window" to null and "max_position_embeddings" to {window}; up to there '
            "the model computes the same"
        )


def _window(config: Any) -> int | None:
    """Tokens that some layer looks back; None where all see everything."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window else None
