"""Layers that keep a fixed state instead of keys and values.

Which kind a layer is, its tensors tell. Letters in shapes as in `operations`.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import numpy as np

from edge_moe.converters.onnx.mixer import Mixer
from edge_moe.converters.onnx.operations import Operations
from edge_moe.converters.onnx.recurrences import (
    LinearHeads,
    causal_convolution,
    linear_attention,
    negative_exponential,
    softplus,
)
from edge_moe.converters.onnx.states import State
from edge_moe.converters.onnx.weights import Weights
from edge_moe.errors import TargetError

_L2_EPSILON = 1e-6  # of the norms of queries and keys, whatever rms_norm_eps says


class ShortConvolution(Mixer):
    """LFM2: a gated convolution over a few tokens."""

    @property
    def states(self) -> tuple[State, ...]:
        shape = (self.config.hidden_size, self.config.conv_L_cache - 1)
        return (State(self.layer, "conv", shape),)

    def mix(self, operations: Operations, weights: Weights, inputs: str) -> str:
        op, width = operations.graph.op, self.config.hidden_size
        projected = weights.linear(operations, f"{self.prefix}.in_proj", inputs)
        before, after, value = operations.split(projected, (width, width, width))
        mixed = causal_convolution(
            operations,
            op("Mul", [before, value]),
            weights.weight(f"{self.prefix}.conv"),
            self.states[0],
            bias=weights.optional(f"{self.prefix}.conv.bias"),
        )
        output = op("Mul", [after, mixed])
        return weights.linear(operations, f"{self.prefix}.out_proj", output)


class GatedDeltaNet(Mixer):
    """Qwen3-Next and Qwen3.5 (arXiv:2412.06464)."""

    @property
    def _heads(self) -> LinearHeads:
        config = self.config
        return LinearHeads(
            config.linear_num_key_heads,
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        )

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Of all queries, of all keys, of all values."""
        heads = self._heads
        keys = heads.num_key * heads.key_width
        return keys, keys, heads.num_value * heads.value_width

    @property
    def states(self) -> tuple[State, ...]:
        kernel_width = self.config.linear_conv_kernel_dim
        return _window_and_matrices(self.layer, self._heads, sum(self._widths), kernel_width)

    def mix(self, operations: Operations, weights: Weights, inputs: str) -> str:
        op, heads, prefix = operations.graph.op, self._heads, self.prefix
        window, matrices = self.states
        mixed, gate, rate, step = self._projections(operations, weights, inputs)
        kernel = weights.weight(f"{prefix}.conv1d")
        mixed = causal_convolution(operations, mixed, kernel, window, with_silu=True)
        query, key, value = operations.split(mixed, self._widths)
        query, key = (self._normed(operations, part) for part in (query, key))
        factor = negative_exponential(operations, weights.tensor(f"{prefix}.A_log"))
        step = softplus(operations, step, weights.tensor(f"{prefix}.dt_bias"))
        mixed = linear_attention(
            operations,
            (query, key, value),
            matrices,
            heads,
            decay=op("Mul", [step, factor]),
            beta=op("Sigmoid", [rate]),
            scale=heads.key_width**-0.5,
        )
        by_head = operations.reshape(mixed, 0, 0, heads.num_value, heads.value_width)
        norm = weights.weight(f"{prefix}.norm")
        normed = operations.rms_norm(by_head, norm, self.config.rms_norm_eps)
        normed = operations.reshape(normed, 0, 0, heads.num_value * heads.value_width)
        output = operations.silu_gated(gate, normed)
        return weights.linear(operations, f"{prefix}.out_proj", output)

    def _projections(
        self, operations: Operations, weights: Weights, inputs: str
    ) -> tuple[str, str, str, str]:
        """Queries, keys and values side by side; the output's gate; beta and time steps."""
        prefix = self.prefix
        if f"{prefix}.in_proj_qkv.weight" in weights.tensors:
            mixed, gate, rate, step = (
                weights.linear(operations, f"{prefix}.in_proj_{name}", inputs)
                for name in ("qkv", "z", "b", "a")
            )
            return mixed, gate, rate, step
        return self._grouped_projections(operations, weights, inputs)

    def _grouped_projections(
        self, operations: Operations, weights: Weights, inputs: str
    ) -> tuple[str, str, str, str]:
        """Qwen3-Next has all that belongs to one key head together."""
        heads = self._heads
        times = heads.num_value // heads.num_key
        values = times * heads.value_width
        sizes = (heads.key_width, heads.key_width, values, values)
        projected = weights.linear(operations, f"{self.prefix}.in_proj_qkvz", inputs)
        parts = self._by_key_head(operations, projected, sizes)
        projected = weights.linear(operations, f"{self.prefix}.in_proj_ba", inputs)
        rate, step = self._by_key_head(operations, projected, (times, times))
        return operations.graph.op("Concat", parts[:3], axis=-1), parts[3], rate, step

    def _by_key_head(self, operations: Operations, value: str, sizes: tuple[int, ...]) -> list[str]:
        """[b, s, key heads x sum(sizes)] -> [b, s, key heads x size] each."""
        count = self._heads.num_key
        by_head = operations.reshape(value, 0, 0, count, sum(sizes))
        parts = operations.split(by_head, sizes)
        return [
            operations.reshape(part, 0, 0, count * size)
            for part, size in zip(parts, sizes, strict=True)
        ]

    def _normed(self, operations: Operations, value: str) -> str:
        """Every head over its length."""
        count, width = self._heads.num_key, self._heads.key_width
        by_head = operations.reshape(value, 0, 0, count, width)
        normed = operations.unit_norm(by_head, _L2_EPSILON, of_sum=True)
        return operations.reshape(normed, 0, 0, count * width)


class Mamba2(Mixer):
    """Nemotron-H (arXiv:2405.21060): keys are B, queries C, values dt x, the decay dt A."""

    def __init__(self, config: Any, layer: int, prefix: str) -> None:
        super().__init__(config, layer, prefix)
        if config.mamba_hidden_act not in ("silu", "swish"):
            raise TargetError(
                "target onnx: onnxruntime's causal convolution knows silu, this checkpoint has "
                f"mamba_hidden_act={config.mamba_hidden_act!r}: use --target native"
            )

    @property
    def _heads(self) -> LinearHeads:
        config = self.config
        count, width = config.mamba_num_heads, config.mamba_head_dim
        return LinearHeads(config.n_groups, count, config.ssm_state_size, width)

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Of all x, of all B, of all C."""
        heads = self._heads
        keys = heads.num_key * heads.key_width
        return heads.num_value * heads.value_width, keys, keys

    @property
    def states(self) -> tuple[State, ...]:
        kernel_width = self.config.conv_kernel
        return _window_and_matrices(self.layer, self._heads, sum(self._widths), kernel_width)

    def mix(self, operations: Operations, weights: Weights, inputs: str) -> str:
        heads, prefix = self._heads, self.prefix
        width = heads.num_value * heads.value_width
        projected = weights.linear(operations, f"{prefix}.in_proj", inputs)
        sizes = (width, sum(self._widths), heads.num_value)
        gate, mixed, step = operations.split(projected, sizes)
        mixed = causal_convolution(
            operations,
            mixed,
            weights.weight(f"{prefix}.conv1d"),
            self.states[0],
            bias=weights.optional(f"{prefix}.conv1d.bias"),
            with_silu=True,
        )
        mixed = self._recurrence(operations, weights, mixed, step)
        output = self._grouped_norm(operations, weights, operations.silu_gated(gate, mixed))
        return weights.linear(operations, f"{prefix}.out_proj", output)

    def _recurrence(self, operations: Operations, weights: Weights, mixed: str, step: str) -> str:
        op, constant, prefix = operations.graph.op, operations.graph.constant, self.prefix
        heads = self._heads
        width = heads.num_value * heads.value_width
        value, key, query = operations.split(mixed, self._widths)
        step = softplus(operations, step, weights.tensor(f"{prefix}.dt_bias"))
        step = op("Max", [step, constant(self.config.time_step_min, np.float32)])
        factor = negative_exponential(operations, weights.tensor(f"{prefix}.A_log"))
        by_head = operations.reshape(value, 0, 0, heads.num_value, heads.value_width)
        scaled = op("Mul", [by_head, op("Unsqueeze", [step, constant([3])])])
        output = linear_attention(
            operations,
            (query, key, operations.reshape(scaled, 0, 0, width)),
            self.states[1],
            heads,
            decay=op("Mul", [step, factor]),
            scale=1.0,
        )
        skip = operations.graph.weight(weights.tensor(f"{prefix}.D"))
        skipped = op("Mul", [by_head, op("Unsqueeze", [skip, constant([1])])])
        return op("Add", [output, operations.reshape(skipped, 0, 0, width)])

    def _grouped_norm(self, operations: Operations, weights: Weights, value: str) -> str:
        """One norm for every group of channels."""
        heads = self._heads
        width = heads.num_value * heads.value_width
        groups = operations.reshape(value, 0, 0, heads.num_key, width // heads.num_key)
        normed = operations.unit_norm(groups, self.config.layer_norm_epsilon, of_sum=False)
        weight = operations.graph.weight(weights.weight(f"{self.prefix}.norm"))
        return operations.graph.op("Mul", [operations.reshape(normed, 0, 0, width), weight])


def _window_and_matrices(
    layer: int, heads: LinearHeads, num_channels: int, kernel_width: int
) -> tuple[State, State]:
    """The inputs that a convolution looks back at, and what linear attention keeps."""
    matrices = (heads.num_value, heads.key_width, heads.value_width)
    return (
        State(layer, "conv", (num_channels, kernel_width - 1)),
        State(layer, "recurrent", matrices),
    )


_KINDS: dict[str, type[Mixer]] = {
    "conv.conv.weight": ShortConvolution,
    "linear_attn.conv1d.weight": GatedDeltaNet,
    "mixer.conv1d.weight": Mamba2,
}
"""A tensor that only layers of the kind have."""


def recurrent_layer(tensors: Container[str], config: Any, layer: int, prefix: str) -> Mixer | None:
    """Layer number `layer`, whose tensors start with `prefix`; None where it keeps no state."""
    for name, kind in _KINDS.items():
        if f"{prefix}.{name}" in tensors:
            return kind(config, layer, f"{prefix}.{name.partition('.')[0]}")
    return None
