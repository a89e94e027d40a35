"""The loss of a student on windows of text, beside what another model predicts there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_moe.converters.recover_teacher import TeacherCache, TeacherWindow, divergence
from edge_moe.converters.recover_text import TrainText
from edge_moe.converters.window_training import Losses


class TextStudent(Protocol):
    """A model whose parameters learn."""

    def begin(self) -> None:
        """Parameters have new values."""

    def end(self) -> None:
        """All windows of a step went backward: complete the parameters' gradients."""

    def run(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(logits [W, V], what is added to the loss) of one window."""


class TextObjective:
    """An `Objective` (`window_training`): a student on windows of text."""

    def __init__(self, student: TextStudent, text: TrainText, teacher: TeacherCache | None) -> None:
        """`teacher` holds predictions of all windows that are asked for; None: of no interest."""
        self._student = student
        self._text = text
        self._teacher = teacher

    def begin(self) -> None:
        """Parameters have new values."""
        self._student.begin()

    def end(self) -> None:
        """All windows of a step went backward: complete the parameters' gradients."""
        self._student.end()

    def losses(self, index: int) -> Losses:
        """Of window `index`."""
        token_ids = self._text.windows[index]
        logits, penalty = self._student.run(token_ids)
        wanted = self._teacher.read(index) if self._teacher is not None else None
        return text_losses(logits, token_ids, wanted, penalty)


def text_losses(
    logits: Tensor, token_ids: Sequence[int], wanted: TeacherWindow | None, penalty: Tensor
) -> Losses:
    """Of one window of W tokens, in nats per token; `logits` [W, V].

    `wanted` is what the original predicts there; the divergence is 0 where nobody asks.
    """
    device = logits.device
    against = (
        torch.zeros((), device=device) if wanted is None else divergence(logits, wanted.to(device))
    )
    following = torch.tensor(list(token_ids[1:]), device=device)
    lm_loss = F.cross_entropy(logits[:-1].float(), following)
    return Losses(against, lm_loss, penalty)
