"""HEAPr end to end, with loss gradients measured on the original."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyCheckpoint
from transform_cases import TEXT, logits

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters import gradient_loss
from edge_moe.converters.calibrate import calibrate
from edge_moe.converters.gradient_loss import measure_gradients
from edge_moe.converters.transform import transform
from edge_moe.converters.transform_request import TextLimits
from edge_moe.errors import StatsError


def test_every_expert_keeps_the_units_the_loss_misses_most(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder, task = tiny_checkpoint("qwen3_moe"), tmp_path / "mine.txt"
    task.write_text(TEXT)
    measured = measure_gradients(
        folder, [str(task)], tmp_path / "gradients", window_tokens=32, forms=()
    )
    scores = measured.neuron_scores()
    output = tmp_path / "out"
    transform(folder, [str(task)], output, "heapr", expert_width=32, limits=TextLimits(32))
    found, source = Checkpoint(output), Checkpoint(folder)
    for row, layer_id in enumerate(source.spec.moe_layer_ids):
        kept = np.sort(np.argsort(-scores[row, 5], kind="stable")[:32])
        gate, up, down = source.expert(layer_id, 5)
        expected = gate[kept], up[kept], down[:, kept]
        for part, wanted in zip(found.expert(layer_id, 5), expected, strict=True):
            np.testing.assert_array_equal(part, wanted)
    assert bool(logits(output).isfinite().all())


def test_gradients_beside_the_statistics_must_be_of_the_same_run(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Used where they are, and refused where they are of another text or another model."""
    folder, task, other = tiny_checkpoint("qwen3_moe"), tmp_path / "a.txt", tmp_path / "b.txt"
    task.write_text(TEXT)
    other.write_text(TEXT.upper())
    stats, gradients = tmp_path / "stats", tmp_path / "gradients"
    options: dict[str, Any] = {"window_tokens": 32, "forms": (), "quantiser": "nearest"}
    calibrate(folder, [str(task)], stats, **options)
    measure_gradients(folder, [str(other)], gradients, **options)

    def narrow(model: Path) -> None:
        transform(
            *(model, [str(task)], tmp_path / "out", "heapr"),
            expert_width=32,
            limits=TextLimits(32),
            stats=stats,
        )

    for name in ("gradient.json", "gradient.safetensors"):
        shutil.copy(gradients / name, stats / name)
    with pytest.raises(StatsError, match="gradients do not belong to the statistics"):
        narrow(folder)
    for name in ("gradient.json", "gradient.safetensors"):
        (stats / name).unlink()
    with pytest.raises(StatsError, match="belong to another model"):
        narrow(tiny_checkpoint("olmoe"))
    measure_gradients(folder, [str(task)], stats, **options)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("these were measured already")

    monkeypatch.setattr(gradient_loss, "measure_gradients", never)
    narrow(folder)
    record = json.loads((tmp_path / "out" / "transform.json").read_text())
    assert record["method"] == "heapr"
