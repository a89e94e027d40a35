"""Adding a task delta to the dense weights that a model was opened with.

Once added it takes no memory; meanwhile one segment is unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from edge_moe.delta_file import DeltaFile
from edge_moe.delta_layout import DeltaTensor, unpack_tensor
from edge_moe.errors import DeltaError
from edge_moe.sparse_signs import Flags, Places
from edge_moe.spec import ModelSpec
from edge_moe.tensor_info import read_range


def add_dense(model: Any, delta: DeltaFile, spec: ModelSpec, kept: Sequence[Sequence[int]]) -> None:
    """W + scale * s for every dense tensor; routers have rows for the experts `kept` [L] only.

    Sums are rounded to what the model computes in, which on a CPU is float32.

    Raises:
        DeltaError: a damaged file, or a tensor that the model has no place for.
    """
    rows = {
        f"{spec.moe_module(layer_id)}.{name}": experts
        for layer_id, experts in zip(spec.moe_layer_ids, kept, strict=True)
        for name in spec.router_module_names(layer_id)
    }
    for name, tensor in delta.dense():
        module_name = spec.module_name(name)
        value = _value(model, module_name, delta)
        _add(value, tensor, rows.get(module_name), spec.num_experts, delta, name)


def _add(
    value: torch.Tensor,
    tensor: DeltaTensor,
    experts: Sequence[int] | None,
    num_experts: int,
    delta: DeltaFile,
    name: str,
) -> None:
    num_weights = math.prod(tensor.shape)
    if experts is not None:
        num_weights = num_weights // num_experts * len(experts)
    if value.numel() != num_weights or not value.is_contiguous():
        raise DeltaError(
            f"delta {delta.path}: {name!r} of shape {list(tensor.shape)} does not fit the model's "
            f"{list(value.shape)}: make it again with `edge-moe delta`"
        )
    flat = value.view(-1)
    raw = read_range(delta.path, tensor.offset, tensor.num_bytes)
    for places, is_negative in unpack_tensor(tensor, raw, f"delta {delta.path}: {name!r}"):
        if experts is not None:
            places, is_negative = _of_kept(places, is_negative, tensor, experts, num_experts)
        where = torch.from_numpy(places).to(value.device)
        signed = torch.from_numpy(tensor.signed(is_negative)).to(value.device)
        added = flat[where].float() + signed
        flat[where] = added.to(value.dtype)


def _of_kept(
    places: Places,
    is_negative: Flags,
    tensor: DeltaTensor,
    experts: Sequence[int],
    num_experts: int,
) -> tuple[Places, Flags]:
    """The places in a tensor that has rows for `experts` only, of [E, ...] or [1, E]."""
    width = math.prod(tensor.shape) // num_experts
    row_of = np.full(num_experts, -1, np.int64)
    row_of[np.asarray(experts)] = np.arange(len(experts))
    row = row_of[places // width]
    is_kept = row >= 0
    return (row * width + places % width)[is_kept], is_negative[is_kept]


def _value(model: Any, name: str, delta: DeltaFile) -> torch.Tensor:
    """A parameter or buffer, as a plain tensor that shares its memory."""
    module_name, _, attribute = name.rpartition(".")
    try:
        found = getattr(model.get_submodule(module_name), attribute)
    except AttributeError:
        found = None
    if not isinstance(found, torch.Tensor):
        raise DeltaError(
            f"delta {delta.path}: the model has no tensor {name!r}: make it again with "
            "`edge-moe delta`"
        )
    return found.detach()
