"""Damage that is found before it can speak: dense weights, NaN experts, foreign dtypes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from hand_plan import hand_plan
from safetensors.torch import load_file, save_file

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.layer_stream import LayerStream
from edge_moe.errors import CheckpointError, PackageError
from edge_moe.runtime.session import Session

EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


def _changed(source: Path, folder: Path, change: str) -> Path:
    """A copy of a checkpoint whose expert 5 of layer 1 was spoilt."""
    import torch

    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    if change == "nan":
        tensors[EXPERT][3, 4] = float("nan")
    else:
        tensors[EXPERT] = tensors[EXPERT].to(torch.float64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_changed_dense_weights_are_noticed(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen3_moe")
    package = build(hand_plan(Checkpoint(source), [["bf16"] * 8] * 2), tmp_path / "out")
    with (package / "resident.safetensors").open("r+b") as handle:
        handle.seek(-7, 2)
        byte = handle.read(1)
        handle.seek(-7, 2)
        handle.write(bytes([byte[0] ^ 1]))
    with pytest.raises(PackageError, match=r"resident\.safetensors is damaged.*build the package"):
        Session.open(package)


def test_nan_expert_of_a_checkpoint_is_named(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = _changed(tiny_checkpoint("qwen3_moe"), tmp_path / "nan", "nan")
    with pytest.raises(CheckpointError, match="layer 1 expert 5 holds NaN.*: download it again"):
        Session.open(folder)


def test_embedding_rows_that_end_early_are_an_error(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """The file is cut while it is in use: within a row, and between rows."""
    checkpoint = Checkpoint(shutil.copytree(tiny_checkpoint("qwen3_moe"), tmp_path / "cut"))
    stream = LayerStream(checkpoint, "eager")
    info = checkpoint.tensors[checkpoint.spec.embedding_name]
    row_bytes = info.num_bytes // info.shape[0]
    assert stream.embed([7, 3]).shape == (1, 2, 64)
    for left_bytes in (7 * row_bytes + row_bytes // 2, 7 * row_bytes):
        os.truncate(info.path, info.offset + left_bytes)
        assert stream.embed([3, 6, 3]).shape == (1, 3, 64)
        for ids in ([7], [3, 7], [8, 9]):
            with pytest.raises(CheckpointError, match=r"ended early.*download it again"):
                stream.embed(ids)


def test_foreign_dtype_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = _changed(tiny_checkpoint("qwen3_moe"), tmp_path / "f64", "f64")
    with pytest.raises(CheckpointError, match="up_proj.weight' is F64; edge-moe reads BF16"):
        Session.open(folder)
