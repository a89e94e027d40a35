"""Products with the signs that a `DeltaTail` holds in a slot, on any device.

Letters: n tokens of an expert, H and I its widths, k signs of a matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edge_moe.runtime.delta_tail import DeltaTail
from edge_moe.runtime.kernels.unpack import words_of

Tensor = torch.Tensor
FIRST, DOWN = 0, 1
"""gate_proj over up_proj, and down_proj."""


def delta_outputs(tail: DeltaTail, record: Tensor, index: int, inputs: Tensor) -> Tensor:
    """[n, width] -> float32 [n, rows]: scale * s x of matrix FIRST or DOWN of an expert.

    Every row adds up its inputs, those of -1 from a negated copy. Memory: 8 bytes per sign, and
    two copies of inputs and outputs.

    Args:
        record: uint8 [record_bytes], of which the tail is the end.
    """
    starts, columns = _signs(tail, record, index)
    values = inputs.float()
    if len(values) == 1:  # sums of single values take a slow way through torch
        values = values.expand(2, -1)
    table = torch.cat([values, -values], dim=1).t().contiguous()
    sums = F.embedding_bag(
        columns.to(starts.dtype), table, starts, mode="sum", include_last_offset=True
    )
    return (sums * _row_scales(tail, record, index)[:, None]).t()[: len(inputs)]


def add_delta(tail: DeltaTail, record: Tensor, index: int, matrix: Tensor) -> None:
    """Add scale * s to float32 [rows, width], an unpacked matrix FIRST or DOWN, in place."""
    starts, columns = _signs(tail, record, index)
    rows, width = matrix.shape
    counts = (starts[1:] - starts[:-1]).long()
    row = torch.repeat_interleave(torch.arange(rows, device=matrix.device), counts)
    column = columns.long()
    is_negative = column >= width
    scales = _row_scales(tail, record, index)[row]
    place = row * width + column - width * is_negative
    matrix.view(-1)[place] += torch.where(is_negative, -scales, scales)


def _tail(tail: DeltaTail, record: Tensor) -> Tensor:
    return record[len(record) - tail.num_bytes :]


def _signs(tail: DeltaTail, record: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """(int32 [rows + 1] starts, uint16 [k] columns)"""
    own = _tail(tail, record)
    starts = words_of(own[tail.starts[index]], torch.int32)
    return starts, words_of(own[tail.columns(index, int(starts[-1]))], torch.uint16)


def _row_scales(tail: DeltaTail, record: Tensor, index: int) -> Tensor:
    """float32 [rows]"""
    scales: Tensor = words_of(_tail(tail, record)[:12], torch.float32)
    gate, up, down = scales.unbind()
    if index == DOWN:
        return down.repeat(tail.hidden)
    if tail.inner_rows == tail.width:
        return up.repeat(tail.width)
    return torch.stack([gate, up]).repeat_interleave(tail.width)
