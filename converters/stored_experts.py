"""The experts of a GGUF file where transformers' experts module is expected: one in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_moe.converters.form_loss import LOSSLESS, Exact
from edge_moe.gguf_model import GgufModel
from edge_moe.spec import ModelSpec


class GgufExperts:
    """How a GGUF file stores its experts."""

    def __init__(self, model: GgufModel) -> None:
        self._model = model

    @property
    def spec(self) -> ModelSpec:
        return self._model.spec

    def exact_parts(self, layer_id: int, expert_id: int, form: str) -> Exact:
        """A matrix that is stored in `form` already stays as it is, byte for byte."""
        gate, up, down = (
            form in (kind, "f32", *LOSSLESS.get(kind.upper(), ()))
            for kind in self._model.stored_types(layer_id)
        )
        return gate, up, down


class StoredExperts:
    """The experts of one MoE layer, dequantised one at a time; SwiGLU."""

    is_concatenated = True
    has_bias = False
    has_gate = True

    def __init__(self, model: GgufModel, layer_id: int) -> None:
        self._model = model
        self._layer_id = layer_id
        self._expert_id = -1
        spec = model.spec
        self._gate_up = torch.empty(2 * spec.expert_width, spec.hidden_size)
        self._down = torch.empty(spec.hidden_size, spec.expert_width)
        self.gate_up_proj = _Matrices(self, is_down=False)
        """[e] -> [2I, H]; valid until another expert is asked for."""
        self.down_proj = _Matrices(self, is_down=True)
        """[e] -> [H, I]"""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def load(self, expert_id: int) -> tuple[Tensor, Tensor]:
        """(gate_up [2I, H], down [H, I]) of one expert."""
        if expert_id != self._expert_id:
            gate, up, down = self._model.expert(self._layer_id, expert_id)
            self._gate_up.numpy()[: len(gate)] = gate
            self._gate_up.numpy()[len(gate) :] = up
            self._down.numpy()[...] = down
            self._expert_id = expert_id
        return self._gate_up, self._down


class _Matrices:
    """One projection of all experts, by their number."""

    def __init__(self, experts: StoredExperts, is_down: bool) -> None:
        self._experts = experts
        self._is_down = is_down

    def __getitem__(self, expert_id: int) -> Tensor:
        return self._experts.load(expert_id)[self._is_down]

    def __len__(self) -> int:
        return self._experts._model.spec.num_experts
