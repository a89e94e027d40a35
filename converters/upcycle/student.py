"""The MoE in training: transformers' model, with routed experts whose weights are made anew.

Everything but routed experts and routers is the dense model's, in float32 and frozen, unless the
shared experts are trained too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edge_moe.converters.upcycle.balance import switch_loss
from edge_moe.converters.upcycle.dense_model import PROJECTIONS, DenseModel
from edge_moe.converters.upcycle.moe_modules import CPU, array, empty_model, shared_matrix
from edge_moe.converters.upcycle.routed_weights import Quantiser, RoutedMatrix, round_to_int8
from edge_moe.converters.upcycle.stored_tensor import from_values
from edge_moe.converters.upcycle.target import MoeLayer, MoeShape, Target
from edge_moe.converters.upcycle.write_moe import moe_tensors
from edge_moe.converters.window_training import WindowSettings
from edge_moe.runtime.model import assign
from edge_moe.runtime.moe_block import MoeBlock
from edge_moe.spec import ModelSpec

_ROW_DEVIATION = 0.02  # standard deviation of new router rows


class UpcycleSettings(WindowSettings):
    """How routed experts are trained."""

    steps: int = Field(default=1000, ge=0)
    batch_windows: int = Field(default=4, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    kl_weight: float = Field(default=0.0, ge=0)
    lm_weight: float = Field(default=1.0, ge=0)
    balance_weight: float = Field(default=0.01, ge=0)
    is_ternary: bool = False
    group: int = Field(default=256, gt=0)
    """Weights of a row that share a scale, of ternary ones; of others a whole row does."""
    has_int8_activations: bool = False
    trains_shared: bool = False
    """Shared experts are trained as well."""
    is_checkpointing: bool = False
    """Activations are computed again on the way back instead of kept."""

    def group_of(self, columns: int) -> int:
        """Weights that share a scale in rows of `columns`."""
        return self.group if self.is_ternary else columns


def new_router(num_experts: int, hidden: int, layer_id: int, seed: int) -> npt.NDArray[np.float32]:
    """[E, H] small random rows: experts, which are all alike, differ by the tokens they get."""
    drawn = np.random.default_rng([seed, layer_id]).normal(size=(num_experts, hidden))
    return (_ROW_DEVIATION * drawn).astype(np.float32)


class RoutedExperts(nn.Module):
    """All routed experts of a layer; called as transformers calls its own."""

    def __init__(
        self, dense: Sequence[Tensor], num_experts: int, settings: UpcycleSettings
    ) -> None:
        """`dense` are gate_proj [I, H], up_proj [I, H] and down_proj [H, I]."""
        super().__init__()
        self.matrices = nn.ModuleDict()
        for name, matrix in zip(PROJECTIONS, dense, strict=True):
            quantiser = Quantiser(settings.group_of(matrix.shape[1]), settings.is_ternary)
            is_zero = name == PROJECTIONS[-1]
            self.matrices[name] = RoutedMatrix(matrix, num_experts, quantiser, is_zero=is_zero)
        self._with_int8 = settings.has_int8_activations

    def matrix(self, projection: str) -> RoutedMatrix:
        found = self.matrices[projection]
        assert isinstance(found, RoutedMatrix)
        return found

    def forward(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """[T, H] from `hidden` [T, H] and the router's choice, [T, K] each."""
        gate, up, down = (self.matrix(name).used for name in PROJECTIONS)
        inputs = round_to_int8(hidden) if self._with_int8 else hidden
        output = torch.zeros_like(hidden)
        for expert_id in range(len(gate)):
            tokens, places = torch.where(expert_ids == expert_id)
            if not len(tokens):
                continue
            chosen = inputs[tokens]
            inner = F.silu(F.linear(chosen, gate[expert_id])) * F.linear(chosen, up[expert_id])
            inner = round_to_int8(inner) if self._with_int8 else inner
            given = F.linear(inner, down[expert_id]) * weights[tokens, places, None]
            output = output.index_add(0, tokens, given)
        return output


class Student:
    """The MoE, its trained parameters, and what they become when they are stored."""

    def __init__(
        self,
        dense: DenseModel,
        target: Target,
        shape: MoeShape,
        settings: UpcycleSettings,
        device: torch.device = CPU,
    ) -> None:
        """Memory of `device`: `upcycle.memory.student_terms`.

        Raises:
            CheckpointError: damaged weights.
        """
        self._dense = dense
        self._target = target
        self._shape = shape
        self._settings = settings
        self._device = device
        self.model, spec = _frozen_model(dense, target, shape, device)
        self._blocks = [MoeBlock(self.model, spec, layer) for layer in spec.moe_layer_ids]
        self._is_softmax = spec.router.score_function == "softmax"
        self._balance: list[Tensor] | None = None
        self.parameters: dict[str, Tensor] = {}
        for layer_id, block in enumerate(self._blocks):
            self._start_layer(layer_id, block)
        if settings.is_checkpointing:
            _checkpoint_layers(self.model)

    def _start_layer(self, layer_id: int, block: MoeBlock) -> None:
        settings, shape = self._settings, self._shape
        dense = [
            torch.from_numpy(matrix.read()).to(self._device) for matrix in self._dense.ffn(layer_id)
        ]
        experts = RoutedExperts(dense, shape.num_experts, settings)
        block.module.experts = block.experts = experts
        rows = new_router(
            shape.num_experts, self._dense.config.hidden_size, layer_id, settings.seed
        )
        block.router.weight = nn.Parameter(torch.from_numpy(rows).to(self._device))
        block.router.register_forward_hook(lambda *call: self._hear(*call[2]))
        trained = {"router": block.router.weight}
        for projection in PROJECTIONS:
            matrix = experts.matrix(projection)
            trained |= {f"{projection}.weight": matrix.weight, f"{projection}.scale": matrix.scale}
        if settings.trains_shared:
            shared = block.module.get_submodule(self._target.shared_module)
            for projection in PROJECTIONS:
                weight = shared.get_submodule(projection).weight
                trained[f"shared.{projection}"] = weight.requires_grad_()
        self.parameters |= {f"{layer_id}.{name}": value for name, value in trained.items()}

    def run(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(logits [W, V], weighted mean balance loss of the layers) of one window."""
        self._balance = []
        ids = torch.tensor([list(token_ids)], device=self._device)
        logits = self.model(ids, use_cache=False).logits[0]
        balance, self._balance = self._balance, None  # layers may run again on the way back
        return logits, self._settings.balance_weight * torch.stack(balance).mean()

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """[W, V] of one window, for whoever learns from this model."""
        with torch.no_grad():
            return array(self.run(token_ids)[0].float())

    def begin(self) -> None:
        """Used weights follow the trained ones."""
        for matrix in self._matrices():
            matrix.begin_step()

    def end(self) -> None:
        """Gradients of trained weights from those of used ones."""
        for matrix in self._matrices():
            matrix.end_step()

    def experts(self, layer_id: int) -> RoutedExperts:
        """The routed experts of one layer."""
        found = self._blocks[layer_id].experts
        assert isinstance(found, RoutedExperts)
        return found

    def router(self, layer_id: int) -> npt.NDArray[np.float32]:
        """[E, H]"""
        return array(self._blocks[layer_id].router.weight)

    def shared(self, layer_id: int, projection: str) -> npt.NDArray[np.float32]:
        """A matrix of the shared expert, as a dense layer that is added has it."""
        return shared_matrix(self._blocks[layer_id].module, self._target, projection)

    def _matrices(self) -> list[RoutedMatrix]:
        layers = [self.experts(layer_id) for layer_id in range(len(self._blocks))]
        return [experts.matrix(name) for experts in layers for name in PROJECTIONS]

    def _hear(self, logits: Tensor, _: Tensor, expert_ids: Tensor) -> None:
        """The penalty of one layer's choice; a checkpointed layer makes it again on the way back,
        where it must save as many tensors as before."""
        if self._is_softmax:
            probabilities = logits.float().softmax(-1)
        else:
            scores = logits.float().sigmoid()
            probabilities = scores / scores.sum(-1, keepdim=True)
        penalty = switch_loss(probabilities, expert_ids)
        if self._balance is not None:
            self._balance.append(penalty)


def _frozen_model(
    dense: DenseModel, target: Target, shape: MoeShape, device: torch.device
) -> tuple[Any, ModelSpec]:
    """transformers' model with all weights but routed experts and routers, float32."""
    is_tied = dense.config.is_tied
    spec = ModelSpec.from_config(
        target.config(dense, shape, is_tied=is_tied), source=str(dense.location)
    )
    model = empty_model(dense, target, shape, is_tied=is_tied, device=device)
    empty = from_values("", "F32", np.zeros((shape.num_experts, dense.config.hidden_size), "f4"))
    layers = [MoeLayer(empty, dense.ffn(layer), []) for layer in range(dense.config.num_layers)]
    for tensor in moe_tensors(dense, target, shape, layers, keep_tied=is_tied):
        assign(model, tensor.name, torch.from_numpy(tensor.read()).to(device))
    if is_tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    return model, spec


def _checkpoint_layers(model: Any) -> None:
    """Let every decoder layer keep its inputs alone and run again on the way back."""
    for layer in model.get_decoder().layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
