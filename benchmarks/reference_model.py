"""The reference: transformers' own model in float32, whole or with experts masked out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from edge_moe.checkpoint import Checkpoint
from edge_moe.formats import pack_expert, unpack_expert
from edge_moe.runtime.moe_block import MoeBlock
from edge_moe.spec import ModelSpec

FloatArray = npt.NDArray[np.float32]

TOKENS = [(7 * i * i + 3 * i) % 320 for i in range(300)]
"""More than one chunk of a prompt, and than a sliding window."""


def load(folder: Path) -> Any:
    """transformers' model in float32, every tensor accounted for."""
    pair: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model, info = pair
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model: Any) -> FloatArray:
    with torch.no_grad():
        found: FloatArray = model(torch.tensor([TOKENS])).logits[0].numpy()
    return found


@contextmanager
def table_gelu() -> Iterator[None]:
    """transformers computes GELU as llama.cpp does on a CPU: from a table of float16 values."""
    real = torch.nn.functional.gelu

    def gelu(values: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return real(values.half().float(), *arguments, **options).half().float()

    with mock.patch("torch.nn.functional.gelu", gelu):
        yield


@contextmanager
def dequantised(model: Any, checkpoint: Checkpoint, form: str) -> Iterator[None]:
    """Every expert has the values that `form` keeps of it, in float32."""
    spec, before = checkpoint.spec, []
    for layer_id in spec.moe_layer_ids:
        experts = MoeBlock(model, spec, layer_id).experts
        up_name = "gate_up_proj" if spec.has_gate else "up_proj"
        for parameter, is_up in ((getattr(experts, up_name), True), (experts.down_proj, False)):
            before.append((parameter, parameter.detach().clone()))
            for expert_id in range(spec.num_experts):
                matrices = checkpoint.expert(layer_id, expert_id)
                kept = unpack_expert(form, pack_expert(form, *matrices), *spec.expert_shape)
                sources, changed = (
                    part[:2] if is_up else (part[2], part[2][:0]) for part in (matrices, kept)
                )
                parameter.data[expert_id] = _arranged_as(parameter[expert_id], sources, changed)
    yield
    for parameter, values in before:
        parameter.data.copy_(values)


def _arranged_as(
    parameter: Tensor, source: Sequence[FloatArray], changed: Sequence[FloatArray]
) -> Tensor:
    """`changed` in the order in which `parameter` holds `source`: (gate, up) or (down, nothing)."""
    for arrange in _ARRANGEMENTS:
        held = arrange(*source)
        if held.shape == parameter.shape and np.array_equal(held, parameter.detach().numpy()):
            return torch.from_numpy(np.ascontiguousarray(arrange(*changed)))
    raise RuntimeError("transformers arranges this family's experts in a way that is unknown here")


def _concatenated(first: FloatArray, second: FloatArray) -> FloatArray:
    return np.concatenate([first, second])


def _in_turn(first: FloatArray, second: FloatArray) -> FloatArray:
    """First row of both, second row of both, ..."""
    if len(first) != len(second):
        return first
    return np.stack([first, second], axis=1).reshape(-1, first.shape[1])


_ARRANGEMENTS: tuple[Callable[[FloatArray, FloatArray], FloatArray], ...] = (
    _concatenated,
    lambda first, second: _concatenated(first, second).T,
    lambda first, second: _in_turn(first, second).T,
)


@contextmanager
def masked(model: Any, spec: ModelSpec, dropped: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Routers give the experts `dropped[layer_id]` no chance, whatever they compute."""
    real, gone = torch.nn.functional.linear, {}
    biases = []
    for layer_id, expert_ids in dropped.items():
        block = MoeBlock(model, spec, layer_id)
        gone[id(block.module.get_parameter(spec.router_module_names(layer_id)[0]))] = expert_ids
        if spec.router.has_selection_bias:
            bias = block.tensor(spec.router_module_names(layer_id)[-1])
            biases.append((bias, bias.clone()))
            bias[..., list(expert_ids)] = -torch.inf

    def linear(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found = real(values, weight, bias)
        if id(weight) not in gone:
            return found
        return found.index_fill(-1, torch.tensor(gone[id(weight)]), -torch.inf)

    with mock.patch("torch.nn.functional.linear", linear):
        yield
    for bias, before in biases:
        bias.copy_(before)
