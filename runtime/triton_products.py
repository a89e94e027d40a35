"""Products with the matrices of experts in slots, by Triton kernels: all forms in one launch.

Letters: T tokens, H hidden_size, I expert_width, R pairs of a token and an expert, N outputs.
The kernels are told addresses, so slots of several sizes take part in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edge_moe.formats import expert_packed_bytes, split_form
from edge_moe.runtime.kernels import triton_decode, triton_prefill
from edge_moe.runtime.kernels.triton_forms import TRITON_FORMS
from edge_moe.runtime.kernels.triton_sum import add_weighted
from edge_moe.runtime.products import Chosen, IntArray, Pairs
from edge_moe.runtime.slot_products import most_pairs
from edge_moe.runtime.slots import SlotBuffers
from edge_moe.spec import ModelSpec

Tensor = torch.Tensor

_DECODED_TOKENS = 4
"""Steps of at most so many tokens read an expert once per pair."""


@dataclass(frozen=True)
class _Sizes:
    """What a program of the kernels computes."""

    decode_rows: int
    decode_step_bytes: int
    prefill_pairs: int
    prefill_rows: int
    prefill_step_bytes: int


DEVICE_SIZES = _Sizes(8, triton_decode.STEP_BYTES, 32, 64, triton_prefill.STEP_BYTES)
"""No register is spilled with these, and a chunk of a prompt has some 16 pairs per expert of 128.
Not yet tuned on a GPU."""
_INTERPRETED_SIZES = _Sizes(128, 256, 64, 128, 256)
"""Triton's interpreter takes its time for every step, not for what it computes."""


def can_compute(form: str) -> bool:
    """Whether the kernels know all of an expert's types; gate_proj's must be up_proj's."""
    gate, up, down = split_form(form)
    return gate == up and {up, down} <= TRITON_FORMS


@dataclass(frozen=True)
class _Matrix:
    """Where an expert's matrix lies, for all experts of one form."""

    first_address: int
    """Of the matrix in slot 0."""
    slot_bytes: int
    number: int
    """Position of its type among the types of one launch."""


class TritonProducts:
    """`Products` by Triton kernels, on a CUDA device or in Triton's interpreter."""

    def __init__(self, spec: ModelSpec, buffers: SlotBuffers, forms: frozenset[str]) -> None:
        """`forms` are the ones to compute, of those that `can_compute`."""
        self._spec = spec
        self._forms = forms
        self._buffers = buffers  # what the addresses point into stays alive
        parts = [split_form(form) for form in forms]
        self._first_types = tuple(sorted({up for _, up, _ in parts}))
        self._down_types = tuple(sorted({down for _, _, down in parts}))
        self._first = {form: self._matrix(form, buffers, is_down=False) for form in forms}
        self._down = {form: self._matrix(form, buffers, is_down=True) for form in forms}

    @property
    def most_rows(self) -> int:
        """R that the bill's workspace has room for, see `most_pairs`."""
        return most_pairs(self._spec)

    def batch(self, form: str) -> str | None:
        """All forms at once."""
        return "all" if form in self._forms else None

    def gated(self, chosen: Chosen, inputs: Tensor) -> Tensor:
        """[R, H], outputs of experts that multiply silu(gate) with up."""
        inner = self._multiply_first(chosen, inputs, self._spec.expert_width, is_gated=True)
        return self.down(chosen, inner)

    def gate_up(self, chosen: Chosen, inputs: Tensor) -> Tensor:
        """[R, 2I], gate_proj's outputs before up_proj's; [R, I] without a gate."""
        return self._multiply_first(chosen, inputs, self._spec.inner_rows, is_gated=False)

    def down(self, chosen: Chosen, inner: Tensor) -> Tensor:
        """[R, I] -> float32 [R, H]"""
        tokens = torch.arange(len(inner), device=inner.device)
        outputs = inner.new_empty(len(inner), self._spec.expert_hidden, dtype=torch.float32)
        self._multiply(chosen, self._down, self._down_types, inner, tokens, outputs, False)
        return outputs

    def add(self, output: Tensor, results: Tensor, pairs: Pairs, first: int) -> None:
        """By a kernel that takes the pairs of a token in order."""
        add_weighted(output, results, pairs.places, pairs.weights, first)

    def close(self) -> None:
        """Nothing is held."""

    def _multiply_first(
        self, chosen: Chosen, inputs: Tensor, num_rows: int, *, is_gated: bool
    ) -> Tensor:
        tokens = chosen.tokens
        if tokens is None:
            tokens = torch.zeros(chosen.num_pairs, dtype=torch.int64, device=inputs.device)
        outputs = inputs.new_empty(chosen.num_pairs, num_rows)
        self._multiply(chosen, self._first, self._first_types, inputs, tokens, outputs, is_gated)
        return outputs

    def _multiply(
        self,
        chosen: Chosen,
        matrices: dict[str, _Matrix],
        types: tuple[str, ...],
        inputs: Tensor,
        tokens: Tensor,
        outputs: Tensor,
        is_gated: bool,
    ) -> None:
        """Outputs [R, N] of `matrices`, by the kernel for so many tokens."""
        found = [matrices[form] for form in chosen.forms]
        places = zip(found, chosen.slots, strict=True)
        addresses = np.array([one.first_address + slot * one.slot_bytes for one, slot in places])
        numbers, device = np.array([one.number for one in found]), inputs.device
        inputs, width = inputs.contiguous(), inputs.shape[1]
        sizes = _INTERPRETED_SIZES if device.type == "cpu" else DEVICE_SIZES
        if chosen.num_tokens <= _DECODED_TOKENS:
            rows = np.stack([chosen.per_pair(addresses), chosen.per_pair(numbers)])
            triton_decode.decode(
                inputs,
                torch.cat([tokens[None], torch.from_numpy(rows).to(device)]),
                outputs,
                width=width,
                forms=types,
                is_gated=is_gated,
                tile_rows=sizes.decode_rows,
                step_bytes=sizes.decode_step_bytes,
            )
            return
        tiles = make_tiles(chosen.lengths, addresses, numbers, sizes.prefill_pairs)
        triton_prefill.prefill(
            *(inputs, tokens, torch.from_numpy(tiles).to(device), outputs),
            width=width,
            forms=types,
            is_gated=is_gated,
            tile_pairs=sizes.prefill_pairs,
            tile_rows=sizes.prefill_rows // (1 + is_gated),
            step_bytes=sizes.prefill_step_bytes,
        )

    def _matrix(self, form: str, buffers: SlotBuffers, *, is_down: bool) -> _Matrix:
        sizes, (_, up, down) = expert_packed_bytes(form, *self._spec.expert_shape), split_form(form)
        start = buffers.buffer(sum(sizes)).data_ptr()
        if is_down:
            return _Matrix(start + sizes[0] + sizes[1], sum(sizes), self._down_types.index(down))
        return _Matrix(start, sum(sizes), self._first_types.index(up))


def make_tiles(
    lengths: Sequence[int], addresses: IntArray, numbers: IntArray, tile_pairs: int
) -> IntArray:
    """int64 [4, tiles], what `prefill` asks for, of experts with so many pairs each.

    `addresses` and `numbers` are those of the experts' matrices; an expert without pairs has no
    tile.
    """
    counts = np.asarray(lengths, np.int64)
    num_tiles = -(-counts // tile_pairs)
    stops = np.cumsum(counts)
    expert = np.repeat(np.arange(len(counts)), num_tiles)
    turn = np.arange(len(expert)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    first = (stops - counts)[expert] + turn * tile_pairs
    stop = np.minimum(first + tile_pairs, stops[expert])
    return np.stack([first, stop, addresses[expert], numbers[expert]])
