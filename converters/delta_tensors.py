"""The tensors of two models of one architecture, as the pieces of their differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from edge_moe.budget import num_weights
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.source_bytes import read_float32
from edge_moe.converters.sparsify import Pieces
from edge_moe.delta_layout import DENSE_NAME, layer_name
from edge_moe.packed_tensors import PackedInfo
from edge_moe.sparse_signs import MOST_LENGTH
from edge_moe.tensor_info import FloatArray, TensorInfo


@dataclass(frozen=True)
class DeltaPart:
    """Tensors that lie one after the other in a delta file, in the order of `DeltaInfo`."""

    name: str
    tensors: Sequence[Callable[[], Pieces]]
    """Each gives its pieces; to be asked in order."""
    num_weights: Sequence[int]


def delta_parts(base: Checkpoint, tuned: Checkpoint) -> Iterator[DeltaPart]:
    """The dense tensors, then layer after layer.

    Memory: one expert of both models in float32, or a packed dense tensor of both; of plain dense
    tensors one segment.
    """
    dense = shipped_dense(base)
    yield DeltaPart(
        DENSE_NAME,
        [partial(_dense_pieces, info, tuned.tensors[info.name]) for info in dense],
        [num_weights(info) for info in dense],
    )
    spec, experts = base.spec, _Experts(base, tuned)
    lengths = list(map(prod, spec.expert_matrix_shapes)) * spec.num_experts
    for layer_id in spec.moe_layer_ids:
        yield DeltaPart(
            layer_name(layer_id),
            [partial(experts.pieces, layer_id, number) for number in range(len(lengths))],
            lengths,
        )


def shipped_dense(checkpoint: Checkpoint) -> list[TensorInfo]:
    """Everything but routed experts; a tied lm_head is the embedding once more."""
    spec = checkpoint.spec
    return [info for info in checkpoint.dense_tensors if not spec.is_tied_head(info.name)]


class _Experts:
    """Holds the matrices of one expert of both models, the last that was asked for."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        self._pair = (base, tuned)
        self._held = (-1, -1)
        self._matrices: list[tuple[FloatArray, FloatArray]] = []

    def pieces(self, layer_id: int, number: int) -> Pieces:
        """Of matrix `number` of a layer."""
        expert_id, place = divmod(number, len(self._pair[0].spec.expert_matrix_shapes))
        if self._held != (layer_id, expert_id):
            self._matrices.clear()
            base, tuned = (each.expert(layer_id, expert_id) for each in self._pair)
            pairs = zip(base, tuned, strict=True)
            self._matrices = [pair for pair in pairs if pair[0].size]  # no gate_proj has no rows
            self._held = layer_id, expert_id
        first, second = self._matrices[place]
        return _difference(first.reshape(-1), second.reshape(-1))


def _difference(base: FloatArray, tuned: FloatArray) -> Pieces:
    def pieces() -> Iterator[FloatArray]:
        for start in range(0, len(base), MOST_LENGTH):
            yield tuned[start : start + MOST_LENGTH] - base[start : start + MOST_LENGTH]

    return pieces


def _dense_pieces(base: TensorInfo, tuned: TensorInfo) -> Pieces:
    """Read again for every pass; packed tensors are held."""
    if isinstance(base, PackedInfo) or isinstance(tuned, PackedInfo):
        return _difference(_values(base), _values(tuned))
    length = num_weights(base)

    def pieces() -> Iterator[FloatArray]:
        for start in range(0, length, MOST_LENGTH):
            stop = min(start + MOST_LENGTH, length)
            yield read_float32(_slice(tuned, start, stop)) - read_float32(_slice(base, start, stop))

    return pieces


def _values(info: TensorInfo) -> FloatArray:
    values = info.values() if isinstance(info, PackedInfo) else read_float32(info)
    return np.ascontiguousarray(values).reshape(-1)


def _slice(info: TensorInfo, start: int, stop: int) -> TensorInfo:
    """Entries of a plain tensor, counted over its rows."""
    itemsize = info.num_bytes // num_weights(info)
    offset, num_bytes = info.offset + start * itemsize, (stop - start) * itemsize
    return TensorInfo(info.name, info.path, info.dtype, (stop - start,), offset, num_bytes)
