"""What every layer of a GGUF model keeps of the past, as llama.cpp allocates it.

Which layers attend to a window only, and which are recurrent, is read from the same keys as in
llama.cpp's src/models/*.cpp; sizes of states are those of `llama_hparams::n_embd_r` and `n_embd_s`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edge_moe.gguf_keys import GgufKeys

_FULL_ATTENTION_INTERVAL = 4
"""llama.cpp's own, where the key is absent."""


@dataclass(frozen=True)
class CacheRules:
    """How one of llama.cpp's graphs tells its layers apart."""

    sliding_period: int | None = None
    """Its layers may slide, and all but every so-many-th one do where no key says which."""
    has_interval: bool = False
    """`attention.recurrent_layers` or `full_attention_interval` say which layers are recurrent;
    else layers without key and value heads are."""
    has_lone_experts: bool = False
    """A layer with `feed_forward_length` keeps nothing: it is neither attention nor recurrent."""


@dataclass(frozen=True)
class LayerCaches:
    """Values of all layers together, as `ModelSpec` has them."""

    key_width: int
    """Of one token in one layer with full attention: the mean, rounded up."""
    value_width: int
    num_sliding_layers: int
    sliding_window: int
    sliding_kv_width: int
    """Keys and values of one token in one such layer: the mean, rounded up."""
    num_state_layers: int
    state_values: int


def layer_caches(
    keys: GgufKeys, rules: CacheRules, num_layers: int, heads: int, head_width: int
) -> LayerCaches:
    """What all layers keep; `heads` and `head_width` are what absent keys stand for.

    With multi-head latent attention in its absorbed form (key_length_mla) only keys are cached.

    Raises:
        SpecError: a key that is out of range, or has too few entries.
    """
    kv_heads = keys.per_layer("attention.head_count_kv", num_layers, heads)
    states = _state_layers(keys, rules, kv_heads)
    window = keys.count("attention.sliding_window", 0, least=0)
    sliding = _sliding_layers(keys, rules, window, num_layers) - states
    full = set(range(num_layers)) - states - sliding or set(range(num_layers)) - states
    widths = [keys.count(f"attention.{part}_length", head_width) for part in ("key", "value")]
    if keys.number("attention.key_length_mla") and keys.number("attention.value_length_mla"):
        widths[1] = 0
    sliding_width = sum(
        keys.count(f"attention.{part}_length_swa", width)
        for part, width in zip(("key", "value"), widths, strict=True)
    )
    return LayerCaches(
        key_width=_mean(kv_heads[layer] * widths[0] for layer in full),
        value_width=_mean(kv_heads[layer] * widths[1] for layer in full),
        num_sliding_layers=len(sliding),
        sliding_window=window if sliding else 0,
        sliding_kv_width=_mean(kv_heads[layer] * sliding_width for layer in sliding),
        num_state_layers=len(states),
        state_values=len(states - _lone_experts(keys, rules, num_layers)) * _state_values(keys),
    )


def _state_layers(keys: GgufKeys, rules: CacheRules, kv_heads: Sequence[int]) -> set[int]:
    """Layers without keys and values."""
    if not rules.has_interval:
        return {layer for layer, count in enumerate(kv_heads) if count == 0}
    num_layers = len(kv_heads)
    found = keys.flagged_layers("attention.recurrent_layers", num_layers)
    if found is not None:
        return found
    step = keys.count("full_attention_interval", _FULL_ATTENTION_INTERVAL)
    return {layer for layer in range(num_layers) if (layer + 1) % step}


def _sliding_layers(keys: GgufKeys, rules: CacheRules, window: int, num_layers: int) -> set[int]:
    if rules.sliding_period is None or not window:
        return set()
    name = "attention.sliding_window_pattern"
    found = keys.flagged_layers(name, num_layers)
    if found is not None:
        return found
    period = keys.count(name, rules.sliding_period, least=0)
    return {layer for layer in range(num_layers) if not period or layer % period < period - 1}


def _lone_experts(keys: GgufKeys, rules: CacheRules, num_layers: int) -> set[int]:
    if not rules.has_lone_experts:
        return set()
    widths = keys.per_layer("feed_forward_length", num_layers, 0)
    return {layer for layer, width in enumerate(widths) if width}


def _state_values(keys: GgufKeys) -> int:
    """Values that one recurrent layer keeps: a convolution's window and a state."""
    history = keys.count("shortconv.l_cache", 0, least=0)
    if history:
        return (history - 1) * keys.count("embedding_length")
    inner, state = (keys.count(f"ssm.{name}", 0, least=0) for name in ("inner_size", "state_size"))
    channels = inner + 2 * keys.count("ssm.group_count", 0, least=0) * state
    window = max(keys.count("ssm.conv_kernel", 1, least=0) - 1, 0)
    return window * channels + inner * state


def _mean(values: Iterable[int]) -> int:
    """Rounded up; 0 of nothing."""
    found = list(values)
    return -(-sum(found) // len(found)) if found else 0
