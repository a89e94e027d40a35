"""Sizes of the fixed states that layers without a KV cache keep, in values per sequence.

Shapes as transformers' caches allocate them.
"""

from __future__ import annotations

from edge_moe.config_reader import ConfigReader


def gated_delta_net(read: ConfigReader) -> int:
    """Qwen3-Next and Qwen3.5: the convolution's window, and a matrix per value head."""
    key_width, value_width = read.count("linear_key_head_dim"), read.count("linear_value_head_dim")
    key_heads, value_heads = (
        read.count("linear_num_key_heads"),
        read.count("linear_num_value_heads"),
    )
    channels = 2 * key_heads * key_width + value_heads * value_width
    convolution = channels * read.count("linear_conv_kernel_dim", default=4)
    return convolution + value_heads * key_width * value_width


def mamba2(read: ConfigReader) -> int:
    """Nemotron-H: the convolution's window, and a matrix per head."""
    heads, width = read.count("mamba_num_heads"), read.count("mamba_head_dim")
    state = read.count("ssm_state_size")
    channels = heads * width + 2 * read.count("n_groups", default=1) * state
    return channels * read.count("conv_kernel", default=4) + heads * width * state


def short_convolution(read: ConfigReader) -> int:
    """LFM2: the convolution's window."""
    return read.count("hidden_size") * read.count("conv_L_cache", default=3)


def gated_delta_net_workspace(read: ConfigReader) -> int:
    """Projections in, through the convolution and out; queries, keys and values five times; the
    64 x 64 products of a piece four times."""
    key_width, value_width = read.count("linear_key_head_dim"), read.count("linear_value_head_dim")
    key_heads = read.count("linear_num_key_heads")
    heads = read.count("linear_num_value_heads")
    projected = 2 * key_heads * key_width + 2 * heads * value_width
    return 3 * projected + 5 * heads * (2 * key_width + value_width) + 4 * heads * 64


def mamba2_workspace(read: ConfigReader) -> int:
    """Projections in, through the convolution and out; inputs six times; B and C of every head,
    with their copies; the products within a piece and the state after each, four times."""
    heads, width = read.count("mamba_num_heads"), read.count("mamba_head_dim")
    state, piece = read.count("ssm_state_size"), read.count("chunk_size", default=128)
    projected = 2 * heads * width + 2 * read.count("n_groups", default=1) * state
    within = heads * piece + heads * width * state // piece
    return 3 * projected + 6 * heads * width + 5 * heads * state + 4 * within


def mamba2_onnx_workspace(read: ConfigReader) -> int:
    """x, B and C six times: projected, split, turned for the convolution and back, convolved.

    onnxruntime's LinearAttention goes token by token, with B and C once for every group: nothing of
    what torch computes within a piece (`mamba2_workspace`) is there. Measured: 3.6 to 5.3 times on
    seven shapes, 22 to 77 MB where 85 to 332 MB were counted.
    """
    heads, width = read.count("mamba_num_heads"), read.count("mamba_head_dim")
    keys = read.count("n_groups", default=1) * read.count("ssm_state_size")
    return 6 * (heads * width + 2 * keys)


def short_convolution_workspace(read: ConfigReader) -> int:
    """Three projections, their product, and both sides of the convolution."""
    return 8 * read.count("hidden_size")
