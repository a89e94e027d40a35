"""Tensors that llama.cpp wants otherwise than transformers keeps them.

Letters: H hidden_size, E experts, N heads, D their width, K key heads and V value heads of a gated
delta net.
"""

from __future__ import annotations

import numpy as np

from edge_moe.converters.gguf_family import GgufSource
from edge_moe.tensor_info import FloatArray

Arrays = tuple[FloatArray, ...]


def flat(values: FloatArray, source: GgufSource) -> Arrays:
    """One axis."""
    return (values.reshape(-1),)


def squeezed(values: FloatArray, source: GgufSource) -> Arrays:
    """A convolution [C, 1, T] per channel -> [C, T]."""
    return (values.reshape(values.shape[0], values.shape[-1]),)


def one_more(values: FloatArray, source: GgufSource) -> Arrays:
    """The weight of a norm that multiplies by 1 + w."""
    return (values + np.float32(1),)


def decay(values: FloatArray, source: GgufSource) -> Arrays:
    """A_log -> A."""
    return (-np.exp(values),)


def decay_column(values: FloatArray, source: GgufSource) -> Arrays:
    """A_log [N] -> A [N, 1]."""
    return (-np.exp(values).reshape(-1, 1),)


def column(values: FloatArray, source: GgufSource) -> Arrays:
    """[N] -> [N, 1]."""
    return (values.reshape(-1, 1),)


def grouped(values: FloatArray, source: GgufSource) -> Arrays:
    """The weight of Mamba's norm: one row per group."""
    return (values.reshape(source.number("n_groups"), -1),)


def rotary_pairs(values: FloatArray, source: GgufSource) -> Arrays:
    """Rows of queries or keys [N D, H]: rotary pairs D/2 rows apart -> beside each other."""
    halves = values.reshape(-1, 2, source.head_width // 2, *values.shape[1:])
    return (halves.swapaxes(1, 2).reshape(values.shape),)


def key_and_value(values: FloatArray, source: GgufSource) -> Arrays:
    """kv_b_proj [N (D + D_v), C] of latent attention -> keys [N, C, D], values [N, D_v, C].

    llama.cpp multiplies queries by the keys' part, so that the latent itself is the key.
    """
    nope = source.number("qk_nope_head_dim")
    heads = values.reshape(source.spec.num_attention_heads, -1, values.shape[-1])
    return heads[:, :nope].swapaxes(1, 2), heads[:, nope:]


def taking_turns(values: FloatArray, source: GgufSource) -> Arrays:
    """Biases of gate_up_proj [E, 2I] whose columns take turns -> gate [E, I], up [E, I]."""
    return values[:, ::2], values[:, 1::2]


def query_key_value_gate(values: FloatArray, source: GgufSource) -> Arrays:
    """Qwen3-Next's in_proj_qkvz: rows q, k, v, z of every key head -> (all q, k, v), all z."""
    key, width, each = _delta_net(source)
    heads = values.reshape(-1, 2 * key + 2 * each * width, values.shape[1])
    bounds = (key, 2 * key, 2 * key + each * width)
    parts = [part.reshape(-1, values.shape[1]) for part in np.split(heads, bounds, axis=1)]
    return np.concatenate(parts[:3]), parts[3]


def value_heads(values: FloatArray, source: GgufSource) -> Arrays:
    """Rows of value heads [V, ...]: those of one key head together -> the first of each, ..."""
    return (_tiled(values, source),)


def decay_of_value_heads(values: FloatArray, source: GgufSource) -> Arrays:
    """A_log -> A, of value heads."""
    return (-np.exp(_tiled(values, source)),)


def value_head_rows(values: FloatArray, source: GgufSource) -> Arrays:
    """The same where a head has several rows [V D, ...]."""
    return (_tiled(values, source, _delta_net(source)[1]),)


def value_head_columns(values: FloatArray, source: GgufSource) -> Arrays:
    """The same for the columns [H, V D] of the output projection."""
    turned = _tiled(values.T, source, _delta_net(source)[1])
    return (turned.T,)


def last_value_head_rows(values: FloatArray, source: GgufSource) -> Arrays:
    """The same after the rows of queries and keys; a convolution loses its middle axis."""
    keys = 2 * source.number("linear_num_key_heads") * source.number("linear_key_head_dim")
    rows = values.reshape(values.shape[0], values.shape[-1])
    tiled = _tiled(rows[keys:], source, _delta_net(source)[1])
    return (np.concatenate([rows[:keys], tiled]),)


def _delta_net(source: GgufSource) -> tuple[int, int, int]:
    """(width of a key head, of a value head, value heads per key head)."""
    key_heads, heads = (source.number(f"linear_num_{kind}_heads") for kind in ("key", "value"))
    widths = [source.number(f"linear_{kind}_head_dim") for kind in ("key", "value")]
    return widths[0], widths[1], heads // key_heads


def _tiled(values: FloatArray, source: GgufSource, rows: int = 1) -> FloatArray:
    """Heads of `rows` rows, one key head after the other -> round robin over key heads."""
    each = _delta_net(source)[2]
    heads = values.reshape(-1, each, rows, *values.shape[1:])
    return heads.swapaxes(0, 1).reshape(values.shape)
