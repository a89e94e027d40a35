"""The shape of attention in every layer, as config.json and the layout have it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edge_moe.converters.onnx.layouts import Layout
from edge_moe.converters.onnx.operations import Heads, Tables
from edge_moe.converters.onnx.rope import Rotary, read_rotary
from edge_moe.converters.onnx.weights import Weights
from edge_moe.errors import TargetError
from edge_moe.spec import ModelSpec

_HEAD_UNIT = 16


def read_heads(spec: ModelSpec, config: Any, layout: Layout, weights: Weights, layer: int) -> Heads:
    """Those of layer number `layer`; rotary tables are placed among `weights`.

    Raises:
        TargetError: the graph cannot compute it.
    """
    is_latent = spec.expanded_kv_width > 0
    width, num_kv = spec.query_width // spec.num_attention_heads, spec.num_kv_heads
    layer_type = ""
    if spec.family.has_global_heads:
        own, layer_type = config.per_layer_config[layer], config.layer_types[layer]
        width, num_kv = own.head_dim, own.num_key_value_heads
    tables: Tables = ()
    if layout.is_rotary:
        rotated = config.qk_rope_head_dim if is_latent else width
        tables = _rotary_tables(spec, read_rotary(config, rotated, layer_type), weights, layer_type)
    heads = Heads(
        num_query=spec.num_attention_heads,
        num_kv=num_kv,
        width=width,
        tables=tables,
        is_interleaved=_is_interleaved(config, layout, is_latent),
        scale=_scale(config, layout, width),
        window=_window(spec, config, layer),
    )
    _check(config, heads)
    return heads


def _rotary_tables(spec: ModelSpec, rotary: Rotary, weights: Weights, layer_type: str) -> Tables:
    """Cosines and sines of every position."""
    num_rows, prefix = spec.max_position_embeddings, f"rotary.{layer_type}".strip(".")
    return [
        weights.computed(f"{prefix}.{name}", num_rows, rotary.width // 2, rotary.rows(function))
        for name, function in (("cos", np.cos), ("sin", np.sin))
    ]


def _window(spec: ModelSpec, config: Any, layer: int) -> int:
    """How many of the last tokens a token sees in this layer, itself among them; 0 for all.

    transformers clears `sliding_window` itself where `use_sliding_window` says so.
    """
    windows = spec.family.windows
    if windows == "no layer":
        return 0
    if windows == "layer_types" and config.layer_types[layer] != "sliding_attention":
        return 0
    return int(config.sliding_window or 0)


def _is_interleaved(config: Any, layout: Layout, is_latent: bool) -> bool:
    return bool(getattr(config, "rope_interleave", True)) if is_latent else layout.is_interleaved


def _check(config: Any, heads: Heads) -> None:
    """Refuse what the graph cannot compute.

    Raises:
        TargetError: heads of an odd width, or attention to later tokens.
    """
    if getattr(config, "use_bidirectional_attention", None) == "all":
        raise TargetError(
            "target onnx: a cache has no place for attention to later tokens, which this "
            "checkpoint has (use_bidirectional_attention='all'): use --target native"
        )
    if heads.width % _HEAD_UNIT or heads.rotary_width % _HEAD_UNIT:
        raise TargetError(
            f"target onnx: heads are {heads.width} wide and {heads.rotary_width} of it rotates, "
            f"onnxruntime's attention needs multiples of {_HEAD_UNIT}: use --target native"
        )


def _scale(config: Any, layout: Layout, width: int) -> float:
    """1 / sqrt(width), or the family's own; YaRN with mscale_all_dim raises it (arXiv:2309.00071,
    section 3.4)."""
    if layout.attention_scale is not None:
        return layout.attention_scale
    scale = float(getattr(config, "attention_multiplier", width**-0.5))
    parameters = getattr(config, "rope_parameters", None) or {}
    all_dim = parameters.get("mscale_all_dim", 0)
    if parameters.get("rope_type", "default") == "default" or not all_dim:
        return scale
    factor = parameters["factor"]
    stretch = 0.1 * all_dim * math.log(factor) + 1.0 if factor > 1 else 1.0
    return scale * stretch * stretch
