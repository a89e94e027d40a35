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
from torch.overrides import TorchFunctionMode
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
def dequantised(model: Any, checkpoint: Checkpoint, forms: Mapping[int, str]) -> Iterator[None]:
    """Every expert of a layer has the values that `forms[layer_id]` keeps of it, in float32."""
    spec, before = checkpoint.spec, []
    for layer_id, form in forms.items():
        experts = MoeBlock(model, spec, layer_id).experts
        before += [(parameter, parameter.detach().clone()) for parameter in experts.parameters()]
        for expert_id in range(spec.num_experts):
            store_expert(experts, checkpoint, layer_id, expert_id, form)
    yield
    for parameter, values in before:
        parameter.data.copy_(values)


@contextmanager
def q8_0_inputs(model: Any, spec: ModelSpec, layer_ids: Sequence[int]) -> Iterator[None]:
    """What meets a matrix of these layers' experts is rounded as llama.cpp does it on a CPU.

    Beside weights of 4 or 8 bits it multiplies integers: `quantize_row_q8_0` of ggml-quants.c.
    """
    experts = [MoeBlock(model, spec, layer_id).experts for layer_id in layer_ids]
    matrices = [each for module in experts for each in module.parameters() if each.ndim == 3]
    model.set_experts_implementation("eager")  # one product per expert and matrix
    with _RoundedInputs(matrices) as inputs:
        yield
    if not inputs.num_products:
        raise RuntimeError(f"{spec.model_type}: no product with an expert was seen")


class _RoundedInputs(TorchFunctionMode):
    """Products with views of `matrices` get their left side from `_as_q8_0`."""

    _PRODUCTS = (torch.nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        super().__init__()
        self.num_products = 0
        self._storages = {each.untyped_storage().data_ptr() for each in matrices}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in self._PRODUCTS and args[1].untyped_storage().data_ptr() in self._storages:
            self.num_products += 1
            args = (_as_q8_0(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def _as_q8_0(values: Tensor) -> Tensor:
    """[..., n] after a round trip through blocks of 32: int8 of amax/127, the scale in float16."""
    blocks = values.reshape(-1, 32)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    integers = torch.round(blocks * torch.where(largest > 0, 127 / largest, 0))
    return (integers * (largest / 127).half().float()).reshape(values.shape)


def store_expert(
    experts: Any, checkpoint: Checkpoint, layer_id: int, expert_id: int, form: str
) -> None:
    """Put what `form` keeps of an expert into transformers' module of its layer's experts."""
    spec = checkpoint.spec
    record = pack_expert(form, *checkpoint.expert(layer_id, expert_id))
    stored = unpack_expert(form, record, *spec.expert_shape)
    gate, up, down = (torch.from_numpy(part.copy()) for part in stored)
    inner = experts.gate_up_proj if spec.has_gate else experts.up_proj
    if spec.family.is_transposed:  # and gates and ups take turns
        inner.data[expert_id] = torch.stack([gate, up], dim=1).flatten(0, 1).T
        experts.down_proj.data[expert_id] = down.T
        return
    inner.data[expert_id] = torch.cat([gate, up])
    experts.down_proj.data[expert_id] = down


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
