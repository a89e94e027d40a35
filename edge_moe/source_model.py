"""What planning and billing ask of a model: a Hugging Face checkpoint or a GGUF file has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from edge_moe.spec import ModelSpec


class StoredTensor(Protocol):
    """One tensor of the file."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def num_bytes(self) -> int: ...


class SourceModel(Protocol):
    """A model that plans are made from."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def location(self) -> Path:
        """The folder or file, for messages."""

    @property
    def dense_tensors(self) -> Sequence[StoredTensor]:
        """Everything that is loaded but routed experts."""
