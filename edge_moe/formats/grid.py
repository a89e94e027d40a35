"""The values that a block's weights may take: where searches and GPTQ meet the byte layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_moe.formats.base import FloatArray
from edge_moe.formats.scales import as_half

CodeArray = npt.NDArray[np.int8]

_SMALLEST_SHARE = 1e-4  # of the mean importance: an input that was never seen still counts


@dataclass(frozen=True)
class Grid:
    """A weight of n blocks is `d * scale * code - dmin * min`, one scale per sub-block.

    d and dmin count as fp16 holds them, however they are kept here.
    """

    d: FloatArray
    """[n], like `dmin`."""
    scales: FloatArray
    """[n, S] whole numbers, like `mins`; S sub-blocks in a block."""
    dmin: FloatArray | None = None
    mins: FloatArray | None = None

    @classmethod
    def concatenate(cls, grids: Sequence[Grid]) -> Grid:
        """The blocks of all `grids`, in order; all with a minimum, or none."""
        dmin = [grid.dmin for grid in grids if grid.dmin is not None]
        mins = [grid.mins for grid in grids if grid.mins is not None]
        return cls(
            np.concatenate([grid.d for grid in grids]),
            np.concatenate([grid.scales for grid in grids]),
            np.concatenate(dmin) if dmin else None,
            np.concatenate(mins) if mins else None,
        )

    @classmethod
    def beside(cls, grids: Sequence[Grid]) -> Grid:
        """Block columns of the same rows, left to right, as one grid that goes row by row."""
        num_rows, num_columns = len(grids[0].d), len(grids)
        order = np.arange(num_rows * num_columns).reshape(num_columns, num_rows).T.reshape(-1)
        return cls.concatenate(grids).part(order)

    def part(self, blocks: slice | npt.NDArray[np.intp]) -> Grid:
        """Only these blocks."""
        return Grid(
            self.d[blocks],
            self.scales[blocks],
            None if self.dmin is None else self.dmin[blocks],
            None if self.mins is None else self.mins[blocks],
        )

    def with_scales(self, d: FloatArray, dmin: FloatArray | None = None) -> Grid:
        """The same sub-block scales under other `d` and `dmin` [n]."""
        return Grid(d, self.scales, dmin, self.mins)

    def step(self) -> FloatArray:
        """[n, S] difference between neighbouring values, as unpacking computes it; may be < 0."""
        return as_half(self.d)[:, None] * self.scales

    def offset(self) -> FloatArray | None:
        """[n, S] what is taken off every value, or None where the form has no minimum."""
        if self.dmin is None or self.mins is None:
            return None
        return as_half(self.dmin)[:, None] * self.mins

    def values(self, codes: CodeArray) -> FloatArray:
        """[n, B] codes -> [n, B] weights, equal to what unpacking gives."""
        step, offset = self.step(), self.offset()
        split = codes.reshape(*step.shape, -1).astype(np.float32)
        weights: FloatArray = step[:, :, None] * split
        if offset is not None:
            weights -= offset[:, :, None]
        return weights.reshape(codes.shape)


def column_weights(importance: FloatArray | None, sub_block: int) -> FloatArray | None:
    """[S * B] importance of a block's weights -> [B, S] of mean 1, none below 1e-4.

    None stays None, and an importance that is zero everywhere becomes None: every weight counts
    alike then.
    """
    if importance is None:
        return None
    mean = float(importance.mean(dtype=np.float64))
    if not mean > 0:
        return None
    relative = np.maximum(importance / mean, _SMALLEST_SHARE).astype(np.float32)
    return np.ascontiguousarray(relative.reshape(-1, sub_block).T)
