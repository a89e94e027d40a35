"""A task delta in the slot of a quantised expert: signs behind its packed weights.

Adding a delta to quantised weights and packing them again would lose much of it: a step of 4 bits
is many times as large as what fine-tuning changes, and most sums round back to where they were. So
the packed weights stay as they are and the products of both are added: y = W x + scale * s x. (The
demo model in q4_k with 5 % of two fine-tunes, perplexity 69.1 and 171 without: 60.2 and 106 beside,
65.1 and 134 packed again; `benchmarks/delta.py`.) The signs are unpacked once, when the expert is
paged in: for 4.7 M weights at 5 % that takes 7 ms of one core, the products of a token 0.5 ms, the
slot 0.82 bits per weight.

Behind the expert's own bytes, for gate_proj over up_proj and then for down_proj:

    float32 [4]         scales of gate_proj, up_proj, down_proj, and nothing
    int32 [rows + 1]    of both matrices: where the signs of every row start
    uint16 [most kept]  of both: column of every sign, plus the row's width where it is -1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from edge_moe.delta_file import DeltaFile
from edge_moe.delta_layout import DeltaTensor, split_packed, unpack_tensor
from edge_moe.errors import DeltaError
from edge_moe.formats import split_form

_PLAIN_TYPES = frozenset(("bf16", "f16", "f32"))
"""Experts in these take a delta into their own weights."""
_SCALES = 4
_ALIGNMENT_BYTES = 64
_MOST_WIDTH = 2**15

ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class DeltaTail:
    """Where everything lies in it; the same for all quantised experts of a model."""

    inner_rows: int
    """Of gate_proj and up_proj together: 2I, or I without a gate."""
    hidden: int
    """H, the rows of down_proj and the width of the others."""
    width: int
    """I"""
    most_first: int
    """Most signs of gate_proj and up_proj together."""
    most_down: int

    @classmethod
    def of(cls, delta: DeltaFile) -> DeltaTail:
        """For the experts of a delta.

        Raises:
            DeltaError: rows that are too wide.
        """
        *first, down = delta.most_kept()
        width, hidden = delta.info.expert_shapes[0]
        if max(width, hidden) > _MOST_WIDTH:
            raise DeltaError(
                f"delta {delta.path}: quantised experts of {width} x {hidden} weights have rows "
                f"wider than {_MOST_WIDTH}: use a checkpoint, or a package of 16-bit experts"
            )
        return cls(len(first) * width, hidden, width, sum(first), down)

    @cached_property
    def num_bytes(self) -> int:
        """Behind the packed bytes of every quantised expert."""
        size = self._columns(1) + 2 * self.most_down
        return size + -size % _ALIGNMENT_BYTES

    @property
    def starts(self) -> tuple[slice, slice]:
        """Bytes of the rows' starts, of gate_proj over up_proj and of down_proj."""
        first = 4 * _SCALES
        second = first + 4 * (self.inner_rows + 1)
        return slice(first, second), slice(second, second + 4 * (self.hidden + 1))

    def columns(self, index: int, count: int) -> slice:
        """Bytes of the first `count` columns of matrix 0 or 1."""
        return slice(self._columns(index), self._columns(index) + 2 * count)

    def write(
        self, tail: ByteArray, tensors: Sequence[DeltaTensor], raw: memoryview, what: str
    ) -> None:
        """Fill `tail` (uint8 [num_bytes]) with an expert's delta, `raw` of `DeltaFile.expert`.

        Raises:
            DeltaError: damaged bytes; `what` is what the message calls them.
        """
        scales = [tensor.scale for tensor in tensors]
        without_gate = len(tensors) == 2
        found = np.array([0.0] * without_gate + scales + [0.0], "<f4")
        tail[: 4 * _SCALES] = found.view(np.uint8)
        parts = [_rows_and_columns(*pair, what) for pair in split_packed(tensors, raw)]
        self._write_matrix(tail, 0, parts[:-1])
        self._write_matrix(tail, 1, parts[-1:])

    def _write_matrix(
        self,
        tail: ByteArray,
        index: int,
        parts: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]],
    ) -> None:
        """`parts` one below the other."""
        counts = np.concatenate([count for count, _ in parts])
        starts = np.concatenate([[0], np.cumsum(counts)]).astype("<i4")
        columns = np.concatenate([each for _, each in parts]).astype("<u2", copy=False)
        tail[self.starts[index]] = starts.view(np.uint8)
        tail[self.columns(index, len(columns))] = columns.view(np.uint8)

    def _columns(self, index: int) -> int:
        start: int = self.starts[1].stop
        return start + 2 * self.most_first if index else start


def is_plain(form: str) -> bool:
    """Whether experts in `form` take a delta into their own weights."""
    return _PLAIN_TYPES.issuperset(split_form(form))


def tail_of(tail: DeltaTail | None, form: str) -> DeltaTail | None:
    """`tail` where experts in `form` have one: plain ones take a delta into their own weights."""
    return None if tail is None or is_plain(form) else tail


def _rows_and_columns(
    tensor: DeltaTensor, raw: memoryview, what: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
    """([rows] signs of every row, [signs] their columns as `DeltaTail` has them)."""
    rows, width = tensor.shape
    counts, columns = np.zeros(rows, np.int64), []
    for places, is_negative in unpack_tensor(tensor, raw, what):
        row = places // width
        counts += np.bincount(row, minlength=rows)
        places -= row * width
        places += is_negative * width
        columns.append(places.astype(np.uint16))
    return counts, np.concatenate(columns) if columns else np.empty(0, np.uint16)
