"""What a transform measures of the whole original model before it changes a layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_moe.converters.calibrate import calibrate
from edge_moe.converters.transform_request import PLAIN_QUANTISER, Request
from edge_moe.converters.transforms.base import BoolArray, FloatArray
from edge_moe.errors import StatsError
from edge_moe.stats import ExpertStats
from edge_moe.super_experts import find_super_experts


@dataclass(frozen=True)
class Scores:
    """Statistics, or scores of hidden units."""

    stats: ExpertStats | None = None
    neurons: FloatArray | None = None
    """[L, E, I]"""

    @property
    def protected(self) -> BoolArray | None:
        """[L, E] super experts; None where they were not looked for."""
        return None if self.stats is None else find_super_experts(self.stats.max_output)

    def super_experts(self) -> list[tuple[int, int]]:
        """(layer_id, expert_id) of every super expert."""
        if self.stats is None or self.protected is None:
            return []
        layer_ids = self.stats.info.moe_layer_ids
        return [(layer_ids[row], int(i)) for row, i in np.argwhere(self.protected)]


def measure_scores(request: Request, folder: Path, stats: Path | None) -> Scores:
    """Scores from `stats`, from what an interrupted run left in `folder`, or measured now.

    Raises:
        StatsError: `stats` belong to another model, or hold gradients of another run.
    """
    if request.method.shrinks == "width":
        return Scores(neurons=_neuron_scores(request, folder / "gradients", stats))
    if stats is not None:
        return Scores(stats=_checked_stats(request, stats))
    measured = folder / "stats"
    if (measured / "stats.json").exists():
        return Scores(stats=ExpertStats.load(measured))
    return Scores(
        stats=calibrate(
            request.checkpoint.folder,
            request.tasks,
            measured,
            window_tokens=request.limits.window_tokens,
            max_windows=request.limits.max_windows,
            forms=(),
            quantiser=PLAIN_QUANTISER,
        )
    )


def _checked_stats(request: Request, folder: Path) -> ExpertStats:
    stats = ExpertStats.load(folder)
    if stats.info.model_fingerprint != request.checkpoint.fingerprint:
        raise StatsError(
            f"the statistics in {folder} belong to another model than "
            f"{request.checkpoint.folder}: calibrate this one"
        )
    return stats


def _neuron_scores(request: Request, folder: Path, stats: Path | None) -> FloatArray:
    """[L, E, I] HEAPr scores of every hidden unit, from gradients beside `stats` if there are.

    Raises:
        StatsError: `stats` belong to another model, or the gradients to another run than they.
    """
    from edge_moe.converters.gradient_loss import measure_gradients
    from edge_moe.gradient_stats import GradientStats, load_gradients

    if stats is not None:
        gradients = load_gradients(stats, _checked_stats(request, stats).info)
        if gradients is not None:
            return gradients.neuron_scores()
    if (folder / "gradient.json").exists():
        return GradientStats.load(folder).neuron_scores()
    return measure_gradients(
        request.checkpoint.folder,
        request.tasks,
        folder,
        window_tokens=request.limits.window_tokens,
        max_windows=request.limits.max_windows,
        forms=(),
        quantiser=PLAIN_QUANTISER,
    ).neuron_scores()
