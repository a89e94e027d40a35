"""Experts of a GGUF file in other types than they are stored in, one matrix at a time."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edge_moe.formats.quantise import pack_matrix
from edge_moe.gguf_header import GgufTensorInfo
from edge_moe.gguf_tensors import EXPERT_MATRIX
from edge_moe.gguf_values import read_values


class InputSquares(Protocol):
    """Mean squares of what each matrix of an expert is given, for quantisers that weigh columns."""

    def __call__(
        self, layer_id: int, expert_id: int, is_down: bool
    ) -> npt.NDArray[np.floating] | None:
        """[H], or [I] for down_proj; None where they are not known."""


class SlicePacker:
    """Packs matrices, and keeps them until the byte limit pushes the oldest out."""

    def __init__(
        self, quantiser: str, squares: InputSquares | None = None, limit_bytes: int = 0
    ) -> None:
        self._quantiser = quantiser
        self._squares = squares
        self._limit_bytes = limit_bytes
        self._num_bytes = 0
        self._kept: OrderedDict[tuple[str, int, str], npt.NDArray[np.uint8]] = OrderedDict()

    def packed(self, info: GgufTensorInfo, expert_id: int, form: str) -> npt.NDArray[np.uint8]:
        """Flat bytes of an expert's part of the tensor `info` [E, rows, width] in `form`.

        Memory: that part packed twice and in float32, beside what is kept.

        Raises:
            CheckpointError: NaN or infinity.
        """
        key = info.name, expert_id, form
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        found = self._pack(info, expert_id, form)
        self._kept[key] = found
        self._num_bytes += found.nbytes
        while self._num_bytes > self._limit_bytes:
            self._num_bytes -= self._kept.popitem(last=False)[1].nbytes
        return found

    def _pack(self, info: GgufTensorInfo, expert_id: int, form: str) -> npt.NDArray[np.uint8]:
        match = EXPERT_MATRIX.fullmatch(info.name)
        assert match is not None
        num_experts, rows, width = info.shape
        stride = info.num_bytes // num_experts
        weights = read_values(info, info.offset + expert_id * stride, stride, (rows, width))
        known = None
        if self._squares is not None:
            known = self._squares(int(match.group(1)), expert_id, match.group(2) == "down")
        packed = pack_matrix(form, weights, quantiser=self._quantiser, input_squares=known)
        return packed.reshape(-1)
