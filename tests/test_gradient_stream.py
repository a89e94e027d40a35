"""Streamed loss gradients against autograd on the whole model; shards, kills, damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILY_NAMES, TinyCheckpoint
from torch import Tensor
from whole_model import WholeModel

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.gradient_stream import GradientStream
from edge_moe.converters.gradient_work import GradientWork
from edge_moe.gradient_stats import GRADIENT_VERSION, GradientInfo

TEXT = "def f(x):\n    return x + 1\n\nIt was the best of times, it was the worst of times.\n" * 2
WINDOW_TOKENS = 48


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("task") / "mine.txt"
    path.write_text(TEXT)
    return str(path)


def gradient_info(checkpoint: Checkpoint, windows: list[list[int]], **fields: Any) -> GradientInfo:
    spec = checkpoint.spec
    known: dict[str, Any] = {
        "version": GRADIENT_VERSION,
        "edge_moe_version": "0",
        "model_type": spec.model_type,
        "model_fingerprint": checkpoint.fingerprint,
        "tokenizer_fingerprint": "t",
        "data_fingerprint": "d",
        "tasks": ("mine",),
        "window_tokens": WINDOW_TOKENS,
        "num_windows": len(windows),
        "windows": tuple(range(len(windows))),
        "num_tokens": sum(map(len, windows)),
        "moe_layer_ids": spec.moe_layer_ids,
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "forms": ("drop",),
        "labels": "text",
        "hidden_size": spec.hidden_size,
        "expert_width": spec.expert_width,
    }
    return GradientInfo.model_validate(known | fields)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found.to(wanted.dtype), wanted, rtol=1e-3, atol=2e-5 * scale)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradients_are_those_of_the_whole_model(
    family: str, tiny_checkpoint: TinyCheckpoint, task: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(family)
    whole = WholeModel(folder, task, WINDOW_TOKENS)
    checkpoint, windows = Checkpoint(folder), whole.windows
    info = gradient_info(checkpoint, windows)
    work = GradientWork(tmp_path / "out", info, [len(window) for window in windows])
    wanted = [whole.gradients(window) for window in windows]
    visited = []
    for layer in GradientStream(checkpoint, info, work, windows).layers():
        visited.append(layer.layer_id)
        for window, (_, blocks) in zip(layer.windows, wanted, strict=True):
            expected = blocks[layer.layer_id]
            assert_close(window.inputs, expected["inputs"])
            assert torch.equal(window.expert_ids, expected["expert_ids"])
            assert_close(window.gates.float(), expected["gates"])
            assert float(expected["gradient"].abs().max()) > 0
            assert_close(window.gradient, expected["gradient"])
        work.save_layer(work.layer_zeros(layer.layer_id))
    assert visited == sorted(whole.spec.moe_layer_ids, reverse=True)
    loss_nats = work.collect().loss_nats.values()[0]
    np.testing.assert_allclose(loss_nats, sum(loss for loss, _ in wanted), rtol=1e-5)
