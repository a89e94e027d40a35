"""The MoE in transformers' classes: empty at first, and what its modules hold afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_moe.converters.upcycle.dense_model import PROJECTIONS, DenseModel
from edge_moe.converters.upcycle.target import MoeShape, Target
from edge_moe.runtime.model import fill_buffers
from edge_moe.tensor_info import FloatArray

CPU = torch.device("cpu")


def empty_model(
    dense: DenseModel,
    target: Target,
    shape: MoeShape,
    *,
    is_tied: bool,
    device: torch.device = CPU,
) -> Any:
    """The model in float32, with buffers on `device` and all weights on the meta device."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    values = target.config(dense, shape, is_tied=is_tied)
    config = CONFIG_MAPPING[target.model_type].from_dict(values)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill_buffers(model, device)
    return model.eval().requires_grad_(False)


@contextmanager
def no_loading_bar() -> Iterator[None]:
    """transformers shows no bar of its own, which it draws into files too."""
    from transformers.utils import logging

    is_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if is_shown:
            logging.enable_progress_bar()


def shared_matrix(block: Any, target: Target, projection: str) -> FloatArray:
    """A matrix of the MoE `block`'s shared expert, as a dense layer that is added has it."""
    values = array(block.get_submodule(f"{target.shared_module}.{projection}").weight)
    is_down = projection == PROJECTIONS[-1]
    return values / np.float32(target.shared_down_factor) if is_down else values


def array(values: Tensor) -> FloatArray:
    """The same memory where that is the CPU's."""
    found: FloatArray = values.detach().cpu().numpy()
    return found
