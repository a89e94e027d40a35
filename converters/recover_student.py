"""The shrunken model as a torch module: layer by layer for its routers, whole for its branches.

Packed experts are unpacked to float32, since the gradient of the branches flows through them.
Letters: H hidden_size, I expert_width, R experts that a layer keeps (rows of its router), r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_moe.converters.layer_stream import LayerStream
from edge_moe.converters.recover_memory import BRANCHED_LAYER
from edge_moe.converters.source_bytes import read_all
from edge_moe.converters.stacked_experts import STACKED, empty_stacks, put_expert
from edge_moe.errors import InputError
from edge_moe.formats import unpack_expert
from edge_moe.package import Package
from edge_moe.runtime.allotment import dense_tensors
from edge_moe.runtime.expert_store import PackageStore
from edge_moe.runtime.model import build_model, moe_blocks
from edge_moe.runtime.moe_block import MoeBlock, select_experts
from edge_moe.runtime.paged_experts import register_experts
from edge_moe.spec import ModelSpec
from edge_moe.tensor_info import FloatArray, TensorInfo, to_float32

EXPERTS_IMPLEMENTATION = "grouped_mm"
"""transformers' experts, which autograd can go through."""


def experts_implementation(spec: ModelSpec) -> str:
    """What runs stacks [R, 2I, H] of the family: transformers' own where it lays them out so."""
    is_ours = spec.family.is_transposed or not spec.has_gate
    return STACKED if is_ours else EXPERTS_IMPLEMENTATION


class PackageSource:
    """A package seen as a checkpoint: what `LayerStream` asks of one."""

    def __init__(self, package: Package) -> None:
        self.folder = package.folder
        self.spec = package.spec
        self.dense_tensors: tuple[TensorInfo, ...] = tuple(dense_tensors(package))
        self.tensors = {info.name: info for info in self.dense_tensors}
        self._store = PackageStore(package)

    def num_rows(self, layer_id: int) -> int:
        """Experts that layer `layer_id` keeps."""
        return len(self._store.kept[self.spec.moe_layer_ids.index(layer_id)])

    def read(self, name: str) -> FloatArray:
        """Dense tensor `name` as float32."""
        info = self.tensors[name]
        return to_float32(b"".join(read_all([info])), info.dtype).reshape(info.shape)

    def expert(self, layer_id: int, expert_id: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(gate_proj [I, H], up_proj [I, H], down_proj [H, I]) of one router row, unpacked."""
        key = (self.spec.moe_layer_ids.index(layer_id), expert_id)
        record = self._store.record(key)
        packed = np.empty(record.num_bytes, np.uint8)
        self._store.read_into(key, packed.data)
        return unpack_expert(record.form, packed, *self.spec.expert_shape)

    def close(self) -> None:
        """Close the files."""
        self._store.close()


class PackageStream(LayerStream):
    """Decoder layers of a package, one at a time. Memory: one layer in float32."""

    def __init__(self, source: PackageSource) -> None:
        super().__init__(source, experts_implementation(source.spec))
        self._source = source
        for layer_id in source.spec.moe_layer_ids:
            _shrink_block(self.moe_block(layer_id), source.num_rows(layer_id))

    def _experts(self, layer_id: int) -> tuple[Tensor, Tensor]:
        return stacked_experts(self._source, layer_id)


def stacked_experts(source: PackageSource, layer_id: int) -> tuple[Tensor, Tensor]:
    """(gate_up_proj [R, 2I, H], down_proj [R, H, I]) of one layer, float32."""
    num_rows = source.num_rows(layer_id)
    stacks = empty_stacks(source.spec, num_rows)
    for row in range(num_rows):
        put_expert(stacks, row, source.expert(layer_id, row))
    return stacks


def load_student(package: Package) -> Any:
    """The whole package as a frozen float32 model on the CPU.

    Raises:
        PackageError: damaged bytes.
    """
    spec = package.spec
    source = PackageSource(package)
    rows = [source.num_rows(layer_id) for layer_id in spec.moe_layer_ids]
    register_experts()
    cpu = torch.device("cpu")
    model = build_model(spec, package.folder, source.dense_tensors, rows, cpu)
    model.set_experts_implementation(experts_implementation(spec))
    for layer_id, block in zip(spec.moe_layer_ids, moe_blocks(model, spec), strict=True):
        gate_up, down = stacked_experts(source, layer_id)
        block.experts.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        block.experts.down_proj = nn.Parameter(down, requires_grad=False)
    source.close()
    return model.requires_grad_(False)


class Branch(nn.Module):
    """A frozen linear layer and a low-rank branch beside it: W x + scale * B (A x)."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator):
        """A is uniform in +-1/sqrt(in) as in PEFT, B is zero: at first nothing changes."""
        super().__init__()
        bound = base.in_features**-0.5
        drawn = torch.rand(rank, base.in_features, generator=generator)
        self.base = base
        self.scale = scale
        self.lora_a = nn.Parameter(drawn.mul_(2 * bound).sub_(bound))
        """[r, in]"""
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        """[out, r]"""

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.base(inputs)
        return output + F.linear(F.linear(inputs, self.lora_a), self.lora_b) * self.scale


def add_branches(model: Any, rank: int, alpha: float, seed: int) -> dict[str, Branch]:
    """Put a branch beside every attention output projection; module name -> branch.

    Raises:
        InputError: a rank that saves nothing, or a model without such layers.
    """
    names = [name for name, _ in model.named_modules() if name.endswith(BRANCHED_LAYER)]
    if not names:
        raise InputError(f"the model has no {BRANCHED_LAYER} to put branches on")
    generator = torch.Generator().manual_seed(seed)
    branches: dict[str, Branch] = {}
    for name, base in _linears(model, names):
        most = min(base.in_features, base.out_features)
        if rank > most:
            raise InputError(f"rank {rank} exceeds the {most} of {name}: use --rank {most} or less")
        branches[name] = Branch(base, rank, alpha / rank, generator)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, branches[name])
    return branches


def _linears(model: Any, names: list[str]) -> Iterator[tuple[str, nn.Linear]]:
    for name in names:
        yield name, model.get_submodule(name)


def _shrink_block(block: MoeBlock, num_rows: int) -> None:
    """Give a MoE block on the meta device the shapes of `num_rows` experts."""
    for name, value in block.tensors().items():
        block.set_tensor(name, select_experts(value, range(num_rows)))
    block.set_num_experts(num_rows)
