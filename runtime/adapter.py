"""Merging a package's low-rank branches into the dense weights it was opened with.

After the merge they take no memory; while it runs, one branch and its product [out, in] in float32.
"""

from __future__ import annotations

from typing import Any

import torch

from edge_moe.adapter import BranchTensors, read_branches
from edge_moe.errors import PackageError
from edge_moe.package import ADAPTER_NAME, Package
from edge_moe.runtime.model import file_sha256, read_tensor


def merge_adapter(model: Any, package: Package) -> None:
    """W + (alpha / r) B A for every branch of `package`; nothing where it has none.

    Raises:
        PackageError: adapter.safetensors was changed, or does not fit the model.
        CheckpointError: NaN or infinity in a branch.
    """
    record = package.manifest.adapter
    if record is None:
        return
    path = package.folder / ADAPTER_NAME
    if file_sha256(path) != record.sha256:
        raise PackageError(f"{path} is damaged (its checksum differs): recover the package again")
    for branch in read_branches(package):
        weight = _weight(model, branch, str(path))
        delta = low_rank_product(*read_factors(branch, weight.device), record.alpha / record.rank)
        with torch.no_grad():
            weight.copy_(weight.float().add_(delta))  # rounded once


def read_factors(branch: BranchTensors, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [r, in], B [out, r]) in float32."""
    return (
        read_tensor(branch.lora_a, torch.float32, device),
        read_tensor(branch.lora_b, torch.float32, device),
    )


def low_rank_product(lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * B A, [out, in]."""
    return (lora_b @ lora_a).mul_(scale)


def _weight(model: Any, branch: BranchTensors, path: str) -> torch.Tensor:
    """The weight [out, in] that `branch` is merged into."""
    try:
        weight: torch.Tensor = model.get_submodule(branch.module).weight
    except AttributeError:
        raise PackageError(f"{path}: the model has no layer {branch.module!r}") from None
    shape = (branch.lora_b.shape[0], branch.lora_a.shape[1])
    if tuple(weight.shape) != shape:
        raise PackageError(
            f"{path}: {branch.module} is {list(weight.shape)}, its branch {list(shape)}: "
            "recover the package again"
        )
    return weight
