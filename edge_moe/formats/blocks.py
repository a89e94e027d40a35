"""What all block forms share: rows cut into blocks, worked on in chunks, scales kept as fp16."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from edge_moe.errors import FormError
from edge_moe.formats.base import ByteArray, FloatArray, Form
from edge_moe.formats.grid import CodeArray, Grid

_WEIGHT_LIMIT = 1e7  # no fp16 scale reaches further (65504 * 127), and squares fit in float32
_CHUNK_WEIGHTS = 1 << 16  # float32 temporaries of a chunk stay inside the processor's cache


class BlockForm(Form):
    """A form made of independent blocks. Subclasses pack and unpack whole arrays of blocks.

    Packing is `join(*fit(blocks))`: a search for grid and codes, then their bytes. Whoever chooses
    grid or codes otherwise (refit, GPTQ) calls the two halves.
    Memory of both directions: input, output, and about twenty temporaries of 64 Ki weights.
    """

    code_range: ClassVar[tuple[int, int]]
    """Lowest and highest code."""
    sub_block: ClassVar[int]
    """Weights that share a scale."""

    def pack(self, weights: FloatArray) -> ByteArray:
        row_bytes = self.row_bytes(weights.shape[-1])
        blocks = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1, self.block_size)
        packed = np.empty((len(blocks), self.block_bytes), dtype=np.uint8)
        step = max(1, _CHUNK_WEIGHTS // self.block_size)
        for start in range(0, len(blocks), step):
            chunk = blocks[start : start + step]
            require_weights(self, chunk)
            with np.errstate(over="ignore", invalid="ignore"):  # `_scale_bytes` looks at the result
                packed[start : start + step] = self.join(*self.fit(chunk))
        return packed.reshape(*weights.shape[:-1], row_bytes)

    def unpack(self, packed: ByteArray, width: int) -> FloatArray:
        check_row_bytes(self, packed, width)
        blocks = np.ascontiguousarray(packed, dtype=np.uint8).reshape(-1, self.block_bytes)
        weights = np.empty((len(blocks), self.block_size), dtype=np.float32)
        step = max(1, _CHUNK_WEIGHTS // self.block_size)
        for start in range(0, len(blocks), step):
            weights[start : start + step] = self._unpack_blocks(blocks[start : start + step])
        return weights.reshape(*packed.shape[:-1], width)

    @abstractmethod
    def fit(
        self, blocks: FloatArray, importance: FloatArray | None = None
    ) -> tuple[Grid, CodeArray]:
        """The grid and the codes [n, block_size] found best for finite `blocks` [n, block_size].

        `importance` [block_size] weighs the squared error of each column, alike in all blocks.
        """

    def fit_all(
        self, blocks: FloatArray, importance: FloatArray | None = None
    ) -> tuple[Grid, CodeArray]:
        """`fit` of any number of blocks, a bounded number of weights at a time."""
        step = max(1, _CHUNK_WEIGHTS // self.block_size)
        with np.errstate(over="ignore", invalid="ignore"):  # `_scale_bytes` looks at the result
            found = [
                self.fit(np.ascontiguousarray(blocks[start : start + step]), importance)
                for start in range(0, len(blocks), step)
            ]
        return Grid.concatenate([grid for grid, _ in found]), np.concatenate(
            [codes for _, codes in found]
        )

    @abstractmethod
    def join(self, grid: Grid, codes: CodeArray) -> ByteArray:
        """Grid and codes [n, block_size] -> [n, block_bytes].

        Raises:
            FormError: a scale is beyond the range of fp16.
        """

    @abstractmethod
    def _unpack_blocks(self, packed: ByteArray) -> FloatArray:
        """[n, block_bytes] -> [n, block_size] float32."""

    def _scale_bytes(self, scale: FloatArray) -> ByteArray:
        """[n] float32 -> [n, 2] little-endian fp16.

        Raises:
            FormError: a scale is beyond the range of fp16.
        """
        with np.errstate(over="ignore"):
            half = scale.astype("<f2")
        if not np.isfinite(half).all():
            raise FormError(
                f"form {self.name} keeps fp16 scales, and a block needs {np.abs(scale).max():.3g} "
                "(fp16 ends at 65504): store this expert as bf16 or f32"
            )
        return half.reshape(-1, 1).view(np.uint8)


def require_weights(form: Form, weights: FloatArray) -> None:
    """Raise `FormError` if a weight is NaN, infinite, or beyond what a block form can scale."""
    require_below(form, weights, _WEIGHT_LIMIT)


def require_below(form: Form, weights: FloatArray, limit: float) -> None:
    """Raise `FormError` if a weight is NaN, or its magnitude is not below `limit`."""
    largest = float(np.abs(weights).max(initial=0.0))
    if not largest < limit:
        raise FormError(
            f"form {form.name} cannot hold a weight of magnitude {largest:.3g}: "
            "store this expert as bf16 or f32"
        )


def check_row_bytes(form: Form, packed: ByteArray, width: int) -> None:
    """Raise `FormError` unless the last axis of `packed` is a row of `width` weights."""
    expected = form.row_bytes(width)
    if packed.shape[-1] != expected:
        raise FormError(
            f"a row of {width} weights in form {form.name} takes {expected} bytes, "
            f"found {packed.shape[-1]}"
        )


def scales_of(packed: ByteArray, offset: int) -> FloatArray:
    """fp16 at byte `offset` of every block [n, block_bytes], as float32 [n, 1]."""
    return np.ascontiguousarray(packed[:, offset : offset + 2]).view("<f2").astype(np.float32)
