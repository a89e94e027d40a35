"""The split model in training, and what its weights become when they are stored.

It starts as the folder that the split wrote; with all experts chosen that is the dense model, which
is what it learns from: no other model is loaded. Chosen experts that are too little for a token
make the loss; gradients reach a router through the weights of the experts that it chose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.safetensors_writer import TensorEntry
from edge_moe.converters.upcycle.dense_model import PROJECTIONS, DenseModel
from edge_moe.converters.upcycle.moe_modules import CPU, array, no_loading_bar, shared_matrix
from edge_moe.converters.upcycle.stored_tensor import StoredTensor, from_values
from edge_moe.converters.upcycle.target import Matrices, MoeLayer, MoeShape, Target
from edge_moe.converters.window_training import WindowSettings
from edge_moe.runtime.moe_block import MoeBlock, top_k_holder
from edge_moe.tensor_info import FloatArray

_ROUTER_SIZE = 0.05
"""Root mean square of a router's rows in training: about that of other weights, so that one rate
suits all. Adam does not see the factor."""


class DistilSettings(WindowSettings):
    """How a split model learns from the dense one."""

    steps: int = Field(default=0, ge=0)
    learning_rate: float = Field(default=3e-4, gt=0)
    trains: Literal["routers", "all"] = "all"
    """`all`: routers, norms, experts and shared experts."""


class SplitStudent:
    """transformers' model of the split folder in float32, and the parameters that learn."""

    def __init__(
        self, folder: Path, trains: Literal["routers", "all"], device: torch.device = CPU
    ) -> None:
        """Memory of `device`: `split_memory.distil_terms`."""
        from transformers import AutoModelForCausalLM

        with no_loading_bar():
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, experts_implementation="eager"
            )
        self.model = cast("Any", loaded).to(device)
        self.model.eval().requires_grad_(False)
        self._device = device
        spec = Checkpoint(folder).spec
        self._blocks = [MoeBlock(self.model, spec, layer_id) for layer_id in spec.moe_layer_ids]
        self._num_experts = spec.num_experts
        self._factors: list[float] = []
        self.parameters: dict[str, Tensor] = {}
        for layer_id, block in enumerate(self._blocks):
            rows = block.router.weight
            size = float(rows.square().mean().sqrt())
            self._factors.append(size / _ROUTER_SIZE if size else 1.0)
            self.parameters[f"{layer_id}.router"] = rows.detach() / self._factors[-1]
            rows.requires_grad_()
        if trains == "all":
            self._train_more()

    def begin(self) -> None:
        """Routers follow what is trained."""
        with torch.no_grad():
            for layer_id, factor in enumerate(self._factors):
                scaled = self.parameters[f"{layer_id}.router"] * factor
                self._blocks[layer_id].router.weight.copy_(scaled)

    def end(self) -> None:
        """What is trained of routers gets their gradients, not times the factor.

        Adam's steps would be the same but for its epsilon of 1e-8, to which gradients times 5e-5
        would come near; and the joint norm that clips is that of the model's own weights.
        """
        for layer_id, block in enumerate(self._blocks):
            weight = block.router.weight
            self.parameters[f"{layer_id}.router"].grad = weight.grad
            weight.grad = None

    def run(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(logits [W, V], no penalty) of one window."""
        ids = torch.tensor([list(token_ids)], device=self._device)
        logits: Tensor = self.model(ids, use_cache=False).logits[0]
        return logits, torch.zeros((), device=self._device)

    def logits(self, token_ids: Sequence[int]) -> FloatArray:
        """[W, V] with all experts chosen: the dense model's, as long as nothing has learned."""
        with torch.no_grad(), self._all_experts():
            return array(self.run(token_ids)[0])

    @contextmanager
    def _all_experts(self) -> Iterator[None]:
        holders = [top_k_holder(block.router) for block in self._blocks]
        before = [getattr(holder, name) for holder, name in holders]
        try:
            for holder, name in holders:
                setattr(holder, name, self._num_experts)
            yield
        finally:
            for (holder, name), top_k in zip(holders, before, strict=True):
                setattr(holder, name, top_k)

    def _train_more(self) -> None:
        for name, parameter in self.model.named_parameters():
            is_norm = parameter.ndim == 1 and "norm" in name
            is_ffn = ".mlp." in name and not name.endswith("gate.weight")
            if is_norm or is_ffn:
                self.parameters[name] = parameter.requires_grad_()

    def layers(self, dense: DenseModel, target: Target, shape: MoeShape) -> list[MoeLayer]:
        """Every MoE block as it is now, read when it is written."""
        return [
            self._layer(layer_id, dense, target, shape) for layer_id in range(len(self._blocks))
        ]

    def outside(self, dense: DenseModel) -> DenseModel:
        """`dense` with the norms that were trained."""
        changed = {
            name: from_values(name, dense.tensors[name].dtype, array(value))
            for name, value in self.parameters.items()
            if name in dense.tensors and value.ndim == 1
        }
        return replace(dense, tensors={**dense.tensors, **changed})

    def _layer(self, layer_id: int, dense: DenseModel, target: Target, shape: MoeShape) -> MoeLayer:
        block = self._blocks[layer_id]
        of_shared = partial(shared_matrix, block.module, target)

        def of_expert(expert_id: int, name: str) -> FloatArray:
            if name == PROJECTIONS[-1]:
                return array(block.experts.down_proj[expert_id])
            both = array(block.experts.gate_up_proj[expert_id])
            width = shape.expert_width
            return both[:width] if name == PROJECTIONS[0] else both[width:]

        def matrices(read: Any, width: int) -> Matrices:
            wide, tall = (width, dense.config.hidden_size), (dense.config.hidden_size, width)
            sizes, ffn = (wide, wide, tall), dense.ffn(layer_id)
            gate, up, down = (
                StoredTensor(TensorEntry("", matrix.dtype, size), partial(read, name))
                for name, size, matrix in zip(PROJECTIONS, sizes, ffn, strict=True)
            )
            return gate, up, down

        experts = [
            matrices(partial(of_expert, expert_id), shape.expert_width)
            for expert_id in range(shape.num_experts)
        ]
        router = from_values("", "F32", array(block.router.weight))
        return MoeLayer(router, matrices(of_shared, shape.shared_width), experts)


def trained_weights(dense: DenseModel, shape: MoeShape, trains: str) -> int:
    """How many weights learn."""
    config = dense.config
    routers = config.num_layers * shape.num_experts * config.hidden_size
    if trains == "routers":
        return routers
    ffn = sum(
        math.prod(matrix.shape)
        for layer_id in range(config.num_layers)
        for matrix in dense.ffn(layer_id)
    )
    norms = sum(tensor.shape[0] for tensor in dense.tensors.values() if len(tensor.shape) == 1)
    return routers + ffn + norms
