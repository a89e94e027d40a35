"""Training of the low-rank branches against the original's predictions (`window_training`).

The next-token loss has the weight 0 unless asked for: on the little text that a task comes with it
is learned by heart (demo model, code: 1.086 x the original's perplexity with weight 0.5, 1.081
without).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from edge_moe.converters.recover_student import Branch
from edge_moe.converters.recover_teacher import TeacherCache
from edge_moe.converters.recover_text import TrainText
from edge_moe.converters.text_objective import TextObjective
from edge_moe.converters.window_training import WindowSettings, WindowTraining, checked_settings

_STATE_NAME = "branches.safetensors"
_FACTORS = ("lora_a", "lora_b")


class TrainSettings(WindowSettings):
    """How the branches are trained. The defaults were chosen on the demo model."""

    rank: int = Field(default=32, gt=0)
    steps: int = Field(default=300, gt=0)

    @property
    def alpha(self) -> float:
        """Branches are not scaled, whatever their rank."""
        return float(self.rank)


def train_settings(**values: Any) -> TrainSettings:
    """Settings from options.

    Raises:
        InputError: names the first one that is out of range.
    """
    return checked_settings(TrainSettings, {}, **values)  # `recover` has every name in full


class _BranchedStudent:
    """A model whose branches autograd knows all about."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def begin(self) -> None:
        """Nothing hangs on the parameters."""

    def end(self) -> None:
        """autograd has done it all."""

    def run(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(logits [W, V], no penalty) of one window."""
        logits: Tensor = self._model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
        return logits, torch.zeros(())


class BranchTraining(WindowTraining):
    """A student with branches, its optimiser, and the state file that survives a kill."""

    def __init__(
        self,
        model: Any,
        branches: dict[str, Branch],
        text: TrainText,
        teacher: TeacherCache,
        settings: TrainSettings,
        folder: Path,
    ) -> None:
        """Goes on where `folder` says, or starts. Memory is stated by `recover_memory`.

        Raises:
            InputError: the state file is damaged.
        """
        parameters = {
            f"{name}.{factor}": getattr(branch, factor)
            for name, branch in branches.items()
            for factor in _FACTORS
        }
        objective = TextObjective(_BranchedStudent(model), text, teacher)
        super().__init__(parameters, objective, text, settings, folder / _STATE_NAME)
