"""What packs an expert into a form: the seam between builders and quantisers. No torch."""

from __future__ import annotations

from typing import Protocol

from edge_moe.checkpoint import Checkpoint
from edge_moe.formats.base import ByteArray
from edge_moe.formats.quantise import pack_expert_with


class Packer(Protocol):
    """Packs one expert of a checkpoint into a form."""

    def pack(self, layer_id: int, expert_id: int, form: str) -> ByteArray:
        """The flat record."""


class PlainPacker:
    """Looks at nothing but the weights."""

    def __init__(self, checkpoint: Checkpoint, quantiser: str = "nearest") -> None:
        self._checkpoint = checkpoint
        self._quantiser = quantiser

    def pack(self, layer_id: int, expert_id: int, form: str) -> ByteArray:
        """The flat record of one expert."""
        return pack_expert_with(
            form, *self._checkpoint.expert(layer_id, expert_id), self._quantiser
        )
