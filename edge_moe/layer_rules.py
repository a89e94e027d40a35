"""Which decoder layers are a mixture of experts, and what each layer keeps of the past.

One small function per way in which config.json says so; `edge_moe.arch` names them per family.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from edge_moe.config_reader import ConfigReader
from edge_moe.errors import SpecError

LayerRule = Callable[[ConfigReader, int], tuple[int, ...]]
"""(config, number of layers) -> ids of the MoE layers, ascending."""
Memory = Literal["full", "sliding", "state", "none"]
"""What a layer keeps of the past: all keys and values, a window of them, a fixed state, nothing."""
MemoryRule = Callable[[ConfigReader, int], tuple[Memory, ...]]
"""(config, number of layers) -> one entry per layer."""

_MEMORY: dict[str, Memory] = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "linear_attention": "state",
    "mamba": "state",
    "conv": "state",
    "moe": "none",
    "mlp": "none",
}
_PATTERN = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
"""Nemotron-H's `hybrid_override_pattern`, one letter per layer."""


def every_layer(read: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """All of them."""
    return tuple(range(num_layers))


def sparse_step(read: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """Every `decoder_sparse_step`-th layer that `mlp_only_layers` does not list."""
    step = read.count("decoder_sparse_step", default=1)
    dense = read.items("mlp_only_layers") or ()
    return tuple(
        layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0
    )


def after_first_dense(read: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """All after the first few."""
    first = read.count("first_k_dense_replace", "num_dense_layers", default=0, least=0)
    return tuple(range(first, num_layers))


def sparse_mlp_types(read: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """Those that `mlp_layer_types` calls sparse; without it, all but the first few."""
    types = read.items("mlp_layer_types")
    if types is None:
        return after_first_dense(read, num_layers)
    return tuple(layer for layer, name in enumerate(types[:num_layers]) if name == "sparse")


def within_interval(read: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """Every `moe_layer_interval`-th layer from `moe_layer_start_index` to `..._end_index`."""
    step = read.count("moe_layer_interval", default=1)
    first = read.count("moe_layer_start_index", default=0, least=0)
    last = read.count("moe_layer_end_index", default=num_layers - 1, least=-1)
    last = num_layers - 1 if last < 0 else last
    return tuple(
        layer for layer in range(num_layers) if first <= layer <= last and (layer + 1) % step == 0
    )


def moe_blocks_of_hybrid(read: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """Layers whose one block is a mixture of experts."""
    return tuple(layer for layer, name in enumerate(hybrid_blocks(read)) if name == "moe")


def all_full(read: ConfigReader, num_layers: int) -> tuple[Memory, ...]:
    """Every layer attends to everything."""
    full: tuple[Memory, ...] = ("full",)
    return full * num_layers


def by_layer_types(read: ConfigReader, num_layers: int) -> tuple[Memory, ...]:
    """As `layer_types` says, or the older `full_attn_idxs`, or `full_attention_interval`."""
    types = read.items("layer_types")
    if types is not None:
        return tuple(_memory(read, name) for name in types[:num_layers])
    kinds: tuple[Memory, Memory] = "state", "full"
    full = read.items("full_attn_idxs")
    if full is not None:
        return tuple(kinds[layer in full] for layer in range(num_layers))
    step = read.count("full_attention_interval")
    return tuple(kinds[(layer + 1) % step == 0] for layer in range(num_layers))


def by_hybrid_blocks(read: ConfigReader, num_layers: int) -> tuple[Memory, ...]:
    """As Nemotron-H's list of blocks says."""
    return tuple(_memory(read, name) for name in hybrid_blocks(read))


def hybrid_blocks(read: ConfigReader) -> tuple[str, ...]:
    """`layers_block_type`, or the letters of `hybrid_override_pattern` in words."""
    types = read.items("layers_block_type")
    if types is not None:
        return tuple(str(name) for name in types)
    pattern = read.text("hybrid_override_pattern")
    if pattern is None or not set(pattern) <= set(_PATTERN):
        raise SpecError(
            f"{read.source}: hybrid_override_pattern is {pattern!r}, expected one of "
            f"{' '.join(_PATTERN)} per layer: correct the file or download it again"
        )
    return tuple(_PATTERN[letter] for letter in pattern)


def _memory(read: ConfigReader, name: object) -> Memory:
    if name not in _MEMORY:
        raise SpecError(
            f"{read.source}: a layer of type {name!r} is not supported; {', '.join(_MEMORY)} are"
        )
    return _MEMORY[str(name)]
