"""What computes products with experts in slots, whoever does it: libggml or Triton kernels.

Letters: T tokens, K top_k, H hidden_size, I expert_width, R pairs of a token and an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

Tensor = torch.Tensor
IntArray = npt.NDArray[np.int64]


class Member(NamedTuple):
    """An expert that was chosen, and its pairs: places in the order of `Pairs`."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Pairs:
    """Who chose whom, sorted by router row, then by token. Tensors are on the inputs' device."""

    rows: IntArray
    """[R]"""
    tokens: Tensor
    """int64 [R]"""
    weights: Tensor
    """float32 [R]"""
    shape: tuple[int, int]
    """(T, K)"""

    @classmethod
    def of(cls, rows: Tensor, weights: Tensor) -> Pairs:
        """From [T, K] of both; row -1 is nobody."""
        flat = rows.reshape(-1).cpu().numpy()
        order = np.argsort(flat, kind="stable")[int((flat < 0).sum()) :]
        places = torch.from_numpy(order).to(weights.device)
        scales = weights.reshape(-1)[places].float()
        return cls(flat[order], places // rows.shape[1], scales, (len(rows), rows.shape[1]))

    def members(self) -> Iterator[Member]:
        """Every expert with its places."""
        ids, starts = np.unique(self.rows, return_index=True)
        stops = [*starts.tolist(), len(self.rows)][1 : len(ids) + 1]
        for row, start, stop in zip(ids.tolist(), starts.tolist(), stops, strict=True):
            yield Member(row, start, stop)

    @cached_property
    def places(self) -> Tensor:
        """int64 [T, K], the pairs of every token in order; before them -1 for every nobody."""
        num_tokens, top_k = self.shape
        tokens = self.tokens.cpu().numpy()
        order = np.argsort(tokens, kind="stable")
        counts = np.bincount(tokens, minlength=num_tokens)
        column = np.arange(len(tokens)) - np.repeat(np.cumsum(counts) - counts, counts)
        found = np.full((num_tokens, top_k), -1)
        found[tokens[order], top_k - counts[tokens[order]] + column] = order
        return torch.from_numpy(found).to(self.tokens.device)


class Chosen(NamedTuple):
    """Experts in their slots, each with so many pairs; pairs of an expert lie side by side."""

    forms: Sequence[str]
    """Of every expert."""
    slots: Sequence[int]
    """Of every expert, among those of its size."""
    lengths: Sequence[int]
    """Pairs of every expert."""
    tokens: Tensor | None
    """int64 [R], row of the inputs of each pair; None where there is one row for all."""
    num_tokens: int
    """Of the whole step, whichever part of it these experts are."""

    @property
    def num_pairs(self) -> int:
        """R"""
        return sum(self.lengths)

    def per_pair(self, values: IntArray) -> IntArray:
        """[experts] -> [R]"""
        return values.repeat(self.lengths) if self.num_pairs > len(values) else values


class Products(Protocol):
    """Computes experts as they lie in their slots."""

    @property
    def most_rows(self) -> int:
        """R of one call that the bill's workspace has room for."""

    def batch(self, form: str) -> str | None:
        """Experts for which this is equal may be computed in one call; None: it cannot."""

    def gated(self, chosen: Chosen, inputs: Tensor) -> Tensor:
        """[R, H], un-gated outputs of experts that multiply silu(gate) with up.

        May be overwritten by the next call. `inputs` are [T, H], or [1, H].
        """

    def gate_up(self, chosen: Chosen, inputs: Tensor) -> Tensor:
        """[R, 2I], gate_proj's outputs before up_proj's; [R, I] without a gate."""

    def down(self, chosen: Chosen, inner: Tensor) -> Tensor:
        """[R, I] -> [R, H]"""

    def add(self, output: Tensor, results: Tensor, pairs: Pairs, first: int) -> None:
        """Add the weighted results [R, H] of the pairs from `first` on to float32 [T, H].

        A token's experts are added one after another in router order, so that the sum does not
        depend on how many are given at once. `results` may be overwritten.
        """

    def close(self) -> None:
        """Free what it allocated; the slots are the caller's."""
