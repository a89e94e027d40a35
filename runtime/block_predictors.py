"""Predictors of edge-moe's own runtime that ask about the input of a MoE block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from edge_moe.runtime.predictors import Predictor
from edge_moe.runtime.skipping import SkipRule


class Chooser(Protocol):
    """A MoE block, as far as it can say which experts it would choose."""

    def choose(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, H] -> (router rows, weights), [T, k] each."""

    def ranked(self, hidden: torch.Tensor, width: int) -> list[int]:
        """[1, H] -> at most `width` rows, likeliest first."""


@dataclass
class BlockInput:
    """What the MoE block at hand is given."""

    hidden: torch.Tensor | None = None
    """[1, H]"""

    def values(self) -> npt.NDArray[np.float32] | None:
        """[H]"""
        if self.hidden is None:
            return None
        found: npt.NDArray[np.float32] = self.hidden[0].float().cpu().numpy()
        return found


class NextChoice(Predictor):
    """What the next block would choose: biases, groups and all, but for what would be skipped."""

    name = "next router"

    def __init__(
        self, block_input: BlockInput, blocks: Sequence[Chooser], skip: SkipRule | None = None
    ) -> None:
        self._input = block_input
        self._blocks = blocks
        self._skip = skip

    def learn(self, layer: int, rows: Sequence[int]) -> None:
        """Nothing to learn."""

    def guess(self, layer: int, rows: Sequence[int]) -> list[int]:
        if self._input.hidden is None:
            return []
        chosen, weights = self._blocks[layer + 1].choose(self._input.hidden)
        guessed: list[int] = chosen[0].tolist()
        if self._skip is None:
            return guessed
        gates = weights.float().cpu().numpy()
        is_skipped = self._skip.skips(layer + 1, gates)[0].tolist()
        return [row for row, skipped in zip(guessed, is_skipped, strict=True) if not skipped]


class NextRanking(Predictor):
    """What the next block would choose, and who comes next."""

    def __init__(self, block_input: BlockInput, blocks: Sequence[Chooser], width: int) -> None:
        self.name = f"next router {width}"
        self._input = block_input
        self._blocks = blocks
        self._width = width

    def learn(self, layer: int, rows: Sequence[int]) -> None:
        """Nothing to learn."""

    def guess(self, layer: int, rows: Sequence[int]) -> list[int]:
        if self._input.hidden is None:
            return []
        return self._blocks[layer + 1].ranked(self._input.hidden, self._width)
