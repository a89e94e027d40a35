"""Packages with low-rank branches and router rows written by hand."""

from __future__ import annotations

from pathlib import Path

import torch

from edge_moe.converters.recover_student import Branch, add_branches, load_student
from edge_moe.converters.recover_write import write_recovered
from edge_moe.package import Package


def random_branches(package: Path, rank: int = 4, size: float = 0.05) -> dict[str, Branch]:
    """Branches on every attention output whose B is not zero; alpha is twice the rank."""
    branches = add_branches(load_student(Package(package)), rank, 2.0 * rank, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for branch in branches.values():
            branch.lora_b.copy_(torch.randn(branch.lora_b.shape, generator=generator) * size)
    return branches


def with_adapter(
    package: Path,
    output: Path,
    branches: dict[str, Branch],
    rows: dict[int, torch.Tensor] | None = None,
) -> Path:
    """`package` with these branches and router rows, as recovery would write it."""
    output.mkdir()
    write_recovered(Package(package), output, rows or {}, branches, "{}", "By hand.")
    return output
