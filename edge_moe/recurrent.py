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
