"""The experts of a GGUF file where transformers' experts module is expected: one in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_moe.converters.form_loss import LOSSLESS, Exact
from edge_moe.errors import CheckpointError
from edge_moe.formats import split_form
from edge_moe.gguf_model import GgufModel
from edge_moe.runtime.llama_graph import ARCHITECTURES
from edge_moe.spec import ModelSpec

_OAI_ALPHA, _OAI_LIMIT = 1.702, 7.0
"""What llama.cpp has built in for gpt-oss."""


class GgufExperts:
    """How a GGUF file stores its experts."""

    def __init__(self, model: GgufModel) -> None:
        self._model = model

    @property
    def spec(self) -> ModelSpec:
        return self._model.spec

    def exact_parts(self, layer_id: int, expert_id: int, form: str) -> Exact:
        """A matrix that is stored in `form` already stays as it is, byte for byte."""
        pairs = zip(split_form(form), self._model.stored_types(layer_id), strict=True)
        gate, up, down = (
            part in (kind, "f32", *LOSSLESS.get(kind.upper(), ())) for part, kind in pairs
        )
        return gate, up, down


def _swiglu_oai(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss: a clamped gate with a steeper sigmoid, and up_proj's output plus one."""
    gate, up = gate.clamp(max=_OAI_LIMIT), up.clamp(-_OAI_LIMIT, _OAI_LIMIT)
    return (up + 1) * gate * torch.sigmoid(gate * _OAI_ALPHA)


GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "swiglu_oai": _swiglu_oai,
}
"""`GgufArch.hidden_act` -> what down_proj multiplies, of gate_proj's and up_proj's outputs."""
GATELESS: dict[str, Callable[[Tensor], Tensor]] = {"relu2": lambda up: F.relu(up).square()}
"""The same of experts without a gate."""


class StoredExperts:
    """The experts of one MoE layer, dequantised one at a time."""

    is_concatenated = True

    def __init__(self, model: GgufModel, layer_id: int) -> None:
        self._model = model
        self._layer_id = layer_id
        self._expert_id = -1
        spec = model.spec
        nodes = ARCHITECTURES[model.header.architecture]
        self.has_bias = nodes.has_biases
        self.has_gate = spec.has_gate
        self._with_scales = not nodes.has_expert_scale
        self._activation = spec.hidden_act
        self._gate_up = torch.empty(spec.inner_rows, spec.expert_hidden)
        self._down = torch.empty(spec.expert_hidden, spec.expert_width)
        self.gate_up_proj = _Rows(self, lambda expert_id: self.load(expert_id)[0])
        """[e] -> [2I, H], or [I, H] without a gate; valid until another expert is asked for."""
        self.down_proj = _Rows(self, lambda expert_id: self.load(expert_id)[1])
        """[e] -> [H, I]"""
        self.gate_up_proj_bias = _Rows(self, lambda expert_id: self._biases(expert_id)[0])
        """[e] -> [2I], where there are biases."""
        self.down_proj_bias = _Rows(self, lambda expert_id: self._biases(expert_id)[1])
        """[e] -> [H]"""

    def __len__(self) -> int:
        return self._model.spec.num_experts

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return GATED[self._activation](gate, up)

    def act_fn(self, up: Tensor) -> Tensor:
        return GATELESS[self._activation](up)

    def load(self, expert_id: int) -> tuple[Tensor, Tensor]:
        """(gate_up [2I, H], down [H, I]) of one expert."""
        if expert_id != self._expert_id:
            gate, up, down = self._model.expert(
                self._layer_id, expert_id, with_scales=self._with_scales
            )
            self._gate_up.numpy()[: len(gate)] = gate
            self._gate_up.numpy()[len(gate) :] = up
            self._down.numpy()[...] = down
            self._expert_id = expert_id
        return self._gate_up, self._down

    def _biases(self, expert_id: int) -> tuple[Tensor, Tensor]:
        """(gate_up [2I], down [H]) of one expert.

        Raises:
            CheckpointError: the file has no biases.
        """
        found = self._model.expert_biases(self._layer_id, expert_id)
        if found is None:
            raise CheckpointError(
                f"{self._model.path}: layer {self._layer_id} lacks biases of its experts, which "
                f"{self._model.header.architecture} has: download it again"
            )
        gate, up, down = map(torch.from_numpy, found)
        return torch.cat([gate, up]), down


class _Rows:
    """One tensor of all experts, by their number."""

    def __init__(self, experts: StoredExperts, read: Callable[[int], Tensor]) -> None:
        self._experts = experts
        self._read = read

    def __getitem__(self, expert_id: int) -> Tensor:
        return self._read(expert_id)

    def __len__(self) -> int:
        return len(self._experts)
