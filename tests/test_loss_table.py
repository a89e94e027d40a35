"""The loss that the optimiser sees, and the experts it must protect."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import TinyCheckpoint
from fake_stats import fake_stats

from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import StatsError
from edge_moe.loss_table import DropLoss, LayerScale, LossKind, loss_table
from edge_moe.super_experts import find_super_experts

FORMS = ("drop", "q8_0", "bf16")


@pytest.mark.parametrize(
    ("drop", "factor"),
    [(DropLoss.REROUTE, 1.0), (DropLoss.ZERO, 1.5), (DropLoss.MAX, 1.5), (DropLoss.MEAN, 1.25)],
)
def test_the_loss_of_dropping(
    tiny_checkpoint: TinyCheckpoint, drop: DropLoss, factor: float
) -> None:
    stats = fake_stats(Checkpoint(tiny_checkpoint("qwen3_moe")))
    measured = stats.form_loss.values()
    table = loss_table(stats, FORMS, "bf16", LossKind(drop, LayerScale.RAW, 1.0, 0.0))
    assert table[..., 0] == pytest.approx(measured[..., 0] * factor)
    assert table[..., 1] == pytest.approx(measured[..., stats.form_index("q8_0")])
    assert (table[..., 2] == 0).all()  # the checkpoint's own dtype loses nothing


def test_relative_losses_are_divided_by_the_residual_stream(
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    stats = fake_stats(Checkpoint(tiny_checkpoint("qwen3_moe")))
    raw = loss_table(stats, FORMS, "bf16", LossKind(layers=LayerScale.RAW))
    relative = loss_table(stats, FORMS, "bf16", LossKind(layers=LayerScale.RELATIVE))
    assert relative[0] == pytest.approx(raw[0] / 10)
    assert relative[1] == pytest.approx(raw[1] / 11)
    assert "|hidden state after the layer|" in LossKind(layers=LayerScale.RELATIVE).unit


def test_dropping_is_dearer_and_rare_experts_share_their_layers_mean(
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    stats = fake_stats(Checkpoint(tiny_checkpoint("qwen3_moe")))
    stats.routed_tokens[0] = 0
    stats.routed_tokens[0, 1] = 10
    plain = loss_table(stats, FORMS, "bf16", LossKind(drop_factor=1.0, prior_tokens=0.0))
    found = loss_table(stats, FORMS, "bf16", LossKind(drop_factor=3.0, prior_tokens=20.0))
    shared = 20 * plain[0].sum(axis=0) / 10
    assert found[0, :, 1] == pytest.approx(plain[0, :, 1] + shared[1])
    assert found[0, :, 0] == pytest.approx(3 * (plain[0, :, 0] + shared[0]))
    assert (found[..., 2] == 0).all()


def test_a_form_that_was_not_measured_is_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    stats = fake_stats(Checkpoint(tiny_checkpoint("qwen3_moe")))
    with pytest.raises(StatsError, match="no loss for form 'q3_k'"):
        loss_table(stats, ("drop", "q3_k"), "bf16")


def test_every_kind_has_its_own_unit() -> None:
    kinds = [LossKind(drop, layers) for drop in DropLoss for layers in LayerScale]
    kinds += [LossKind(drop_factor=1.0), LossKind(prior_tokens=0.0)]
    assert len({kind.unit for kind in kinds}) == len(kinds)


def test_super_experts_stand_out_early() -> None:
    outputs = np.full((8, 100), 1.0)
    outputs[1, 7] = 500.0
    outputs[5, 3] = 60.0
    outputs[4, 4] = 49.0  # not above a tenth of the largest
    outputs[7, 9] = 400.0  # beyond the first three quarters of the layers
    assert np.argwhere(find_super_experts(outputs)).tolist() == [[1, 7], [5, 3]]


def test_equal_outputs_hold_no_super_expert() -> None:
    assert not find_super_experts(np.ones((4, 16))).any()
    assert not find_super_experts(np.zeros((1, 4))).any()
