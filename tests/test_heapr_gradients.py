"""HEAPr end to end, with loss gradients measured on the original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from conftest import TinyCheckpoint
from transform_cases import TEXT, logits

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.gradient_loss import measure_gradients
from edge_moe.converters.transform import transform
from edge_moe.converters.transform_request import TextLimits


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
