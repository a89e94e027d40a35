"""`AheadReader`: what reads experts ahead of use in a session, whoever says which."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from edge_moe.runtime.read_ahead import ReadAhead


class AheadReader(ABC):
    """`observe` and `predict` belong to the model's thread. No result depends on it."""

    read_ahead: ReadAhead | None = None
    """Whom to tell when single tokens begin and end; None: nobody."""

    @abstractmethod
    def observe(self, layer: int, rows: list[int]) -> None:
        """A single token is about to use `rows` of `layer`."""

    @abstractmethod
    def predict(self, layer: int, hidden: torch.Tensor, current: list[int]) -> None:
        """Read ahead for what comes after `layer`, which is given [1, H] and uses `current`."""

    @property
    @abstractmethod
    def queued_bytes(self) -> int:
        """Experts that are being read, or will be."""

    @abstractmethod
    def close(self) -> None:
        """Stop; what is being read is finished first."""
