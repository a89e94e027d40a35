"""One MoE layer's experts, asked directly: a package in chosen forms, a choice, the output."""

from __future__ import annotations

from pathlib import Path

import torch
from hand_plan import hand_plan
from torch import Tensor

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.runtime.session import Session


def package_of(checkpoint: Path, forms: tuple[str, ...], folder: Path) -> Path:
    """Experts 0, 1, ... of every layer in `forms`."""
    source = Checkpoint(checkpoint)
    return build(hand_plan(source, [list(forms)] * source.spec.num_moe_layers), folder)


def layer_output(session: Session, hidden: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """[T, H] of the first MoE layer's experts."""
    experts = session._blocks[0].experts
    with torch.inference_mode():
        return session._residency.pager.forward(experts, 0, hidden, rows, weights)


def choices(num_tokens: int, num_experts: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [T, H], rows [T, 2], weights [T, 2]), as a router might choose."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, width, generator=generator)
    rows = torch.rand(num_tokens, num_experts, generator=generator).topk(2).indices
    return hidden, rows, torch.rand(num_tokens, 2, generator=generator)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
