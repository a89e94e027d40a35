"""`PreGate`: decides the experts of all later MoE layers from what the first one is given.

After Read-ME (Cai et al., NeurIPS 2024, arXiv 2410.19123), whose one router decides ahead of the
model for all layers. There it reads token embeddings through a transformer layer of its own; here a
small network reads the input of the first MoE block, which attention has seen already, so that it
keeps no state. The first layer routes by itself.

A safetensors file. H hidden_size, W width, E_l experts of MoE layer l:

    inner.weight   float32 [W, H]      silu(inner.weight x + inner.bias) is what all layers read
    inner.bias     float32 [W]
    score.LAYER    float32 [E_l, W]    for every layer but the first; the largest scores are chosen
    offset.LAYER   float32 [E_l]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from edge_moe.plan import MemoryTerm
from edge_moe.runtime.fitted_file import FittedInfo, FittedKind

PRE_GATE_VERSION = 1
_KIND = FittedKind("pre-gate", "edge_moe_pre_gate", "edge-moe fit-pre-gate", PRE_GATE_VERSION)


class PreGateInfo(FittedInfo):
    """What a pre-gate belongs to, and how it was trained."""

    version: int = PRE_GATE_VERSION
    width: int = Field(gt=0)
    epochs: int
    """After which it was kept."""
    agreement: tuple[float, ...]
    """Per layer but the first: share of its router's choices that are the pre-gate's, too, on
    windows of the calibration text that were held out."""


@dataclass(frozen=True, eq=False)
class PreGate:
    """See the module; layer l is at l - 1 in `scores` and `offsets`."""

    info: PreGateInfo
    inner: Tensor
    inner_bias: Tensor
    scores: list[Tensor]
    offsets: list[Tensor]

    @property
    def num_bytes(self) -> int:
        """In memory."""
        tensors = (self.inner, self.inner_bias, *self.scores, *self.offsets)
        return sum(each.nbytes for each in tensors)

    @property
    def memory_term(self) -> MemoryTerm:
        """What it takes in memory."""
        note = "decides the experts of all layers but the first"
        return MemoryTerm(name=_KIND.name, num_bytes=self.num_bytes, source="formula", note=note)

    @property
    def label(self) -> str:
        """What it is, in words."""
        shares = " ".join(f"{share:.0%}" for share in self.info.agreement)
        return (
            f"fitted on {self.info.num_tokens} tokens; chooses of what the routers would, by "
            f"layer: {shares}"
        )

    def choose(self, hidden: Tensor, top_k: int) -> list[Tensor]:
        """Rows [T, k] of every MoE layer but the first, best first; `hidden` [T, H]."""
        inner = functional.silu(
            functional.linear(hidden.to(self.inner.dtype), self.inner, self.inner_bias)
        )
        return [
            functional.linear(inner, score, offset).topk(top_k, dim=1).indices
            for score, offset in zip(self.scores, self.offsets, strict=True)
        ]

    def to(self, device: torch.device) -> PreGate:
        """On `device`."""
        return PreGate(
            self.info,
            self.inner.to(device),
            self.inner_bias.to(device),
            [each.to(device) for each in self.scores],
            [each.to(device) for each in self.offsets],
        )

    def for_experts(self, kept: Sequence[Sequence[int]]) -> PreGate:
        """The pre-gate of routers that have rows for the experts `kept` only.

        Raises:
            InputError: it lacks one of them.
        """
        scores, offsets = [], []
        for layer in range(1, len(kept)):
            rows = _KIND.rows_of(self.info, layer, kept[layer])
            scores.append(self.scores[layer - 1][rows])
            offsets.append(self.offsets[layer - 1][rows])
        info = self.info.model_copy(update={"kept": tuple(map(tuple, kept))})
        return PreGate(info, self.inner, self.inner_bias, scores, offsets)

    def require_model(self, fingerprint: str, hidden_size: int, num_layers: int) -> None:
        """Raise InputError unless it was trained for this model."""
        _KIND.require_model(self.info, fingerprint, hidden_size, num_layers)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        tensors = {"inner.weight": self.inner, "inner.bias": self.inner_bias}
        for layer, (score, offset) in enumerate(zip(self.scores, self.offsets, strict=True), 1):
            tensors |= {f"score.{layer}": score, f"offset.{layer}": offset}
        arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        _KIND.write(path, self.info, arrays)

    @classmethod
    def load(cls, path: Path) -> PreGate:
        """Read and check what `save` wrote.

        Raises:
            InputError: missing, damaged, another version, or arrays that contradict the header.
        """
        info, arrays = _KIND.read(path, PreGateInfo)
        layers = range(1, len(info.kept))
        shapes: dict[str, tuple[int, ...]] = {
            "inner.weight": (info.width, info.hidden_size),
            "inner.bias": (info.width,),
        }
        for layer in layers:
            shapes[f"score.{layer}"] = (len(info.kept[layer]), info.width)
            shapes[f"offset.{layer}"] = (len(info.kept[layer]),)
        _KIND.check_arrays(path, arrays, shapes)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return cls(
            info,
            tensors["inner.weight"],
            tensors["inner.bias"],
            [tensors[f"score.{layer}"] for layer in layers],
            [tensors[f"offset.{layer}"] for layer in layers],
        )
