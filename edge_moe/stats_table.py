"""Calibration statistics summarised for people: how the tokens spread over each layer's experts."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from edge_moe.gradient_stats import GradientStats
from edge_moe.stats import ExpertStats, StatsInfo


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerSpread(_Model):
    """One MoE layer."""

    layer_id: int
    unseen_experts: int
    """Experts that no calibration token chose."""
    experts_for_half: int
    """Fewest experts that together take half of the routed tokens."""
    busiest_expert_id: int
    busiest_share: float
    form_loss: dict[str, float]
    """Summed over experts, as a share of |MoE output|**2, for every measured form."""


class StatsSummary(_Model):
    """`edge-moe stats show`."""

    info: StatsInfo
    layers: list[LayerSpread]
    nats_per_token: float | None = None
    """Mean cross-entropy of the text; None without gradient statistics."""


def summarise_stats(stats: ExpertStats, gradients: GradientStats | None = None) -> StatsSummary:
    """The spread of routed tokens and the loss of every form, layer by layer."""
    losses = stats.form_loss.values().sum(axis=1)  # [L, F]
    squares = np.maximum(stats.layer_sums["moe_square"].values(), np.finfo(np.float64).tiny)
    layers = []
    for row, layer_id in enumerate(stats.info.moe_layer_ids):
        counts = stats.routed_tokens[row]
        shares = np.sort(counts)[::-1].cumsum() / max(int(counts.sum()), 1)
        layers.append(
            LayerSpread(
                layer_id=layer_id,
                unseen_experts=int((counts == 0).sum()),
                experts_for_half=int(np.searchsorted(shares, 0.5)) + 1,
                busiest_expert_id=int(counts.argmax()),
                busiest_share=float(counts.max() / max(int(counts.sum()), 1)),
                form_loss={
                    form: float(losses[row, index] / squares[row])
                    for index, form in enumerate(stats.info.forms)
                },
            )
        )
    nats_per_token = None
    if gradients is not None:
        nats_per_token = float(gradients.loss_nats.values()[0]) / gradients.info.num_predictions
    return StatsSummary(info=stats.info, layers=layers, nats_per_token=nats_per_token)


def print_stats(summary: StatsSummary, console: Console) -> None:
    """One row per layer."""
    info = summary.info
    console.print(
        f"{info.model_type} on {', '.join(info.tasks)}: {info.num_tokens:,} tokens, "
        f"{len(info.windows)} of {info.num_windows} windows of {info.window_tokens}, "
        f"{info.num_experts} experts, top-{info.top_k}",
        markup=False,
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "unseen", "experts for half", "busiest"):
        table.add_column(heading, justify="right")
    for form in info.forms:
        table.add_column(form, justify="right")
    for layer in summary.layers:
        table.add_row(
            str(layer.layer_id),
            str(layer.unseen_experts),
            str(layer.experts_for_half),
            f"{layer.busiest_expert_id} ({layer.busiest_share:.0%})",
            *(f"{loss:.2g}" for loss in layer.form_loss.values()),
        )
    console.print(table)
    console.print("under a form: loss with the whole layer in it, as a share of the MoE output")
    if summary.nats_per_token is not None:
        console.print(f"with loss gradients, at {summary.nats_per_token:.3f} nats per token")
