"""What a transform measures of the whole original model before it changes a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from edge_moe.converters.calibrate import calibrate
from edge_moe.converters.transform_request import PLAIN_QUANTISER, Request
from edge_moe.converters.transforms.base import BoolArray, FloatArray
from edge_moe.errors import InputError, StatsError
from edge_moe.gradient_stats import GradientStats, load_gradients
from edge_moe.planner import stats_fingerprint
from edge_moe.stats import ExpertStats, StatsInfo
from edge_moe.super_experts import find_super_experts

StatsT = TypeVar("StatsT", ExpertStats, GradientStats)


@dataclass(frozen=True)
class Scores:
    """Statistics, or scores of hidden units."""

    info: StatsInfo
    """The calibration that they come from."""
    stats: ExpertStats | None = None
    neurons: FloatArray | None = None
    """[L, E, I]"""
    folder: Path | None = None
    """The statistics that were given; None where they were measured for this transform."""
    fingerprint: str | None = None
    """sha256 over what was given."""

    @property
    def protected(self) -> BoolArray | None:
        """[L, E] super experts; None where they were not looked for."""
        return None if self.stats is None else find_super_experts(self.stats.max_output)

    def super_experts(self) -> list[tuple[int, int]] | None:
        """(layer_id, expert_id) of every super expert; None where they were not looked for."""
        if self.protected is None:
            return None
        layer_ids = self.info.moe_layer_ids
        return [(layer_ids[row], int(i)) for row, i in np.argwhere(self.protected)]


def given_scores(request: Request, folder: Path | None) -> Scores | None:
    """Scores from the statistics in `folder`; None where it is None.

    Raises:
        StatsError: they belong to another model, or to another task than the text that the method
            also reads, or hold gradients of another run.
        InputError: they hold no gradients, and the method ranks hidden units.
    """
    if folder is None:
        return None
    stats = _checked_stats(request, folder)
    if request.method.shrinks == "experts":
        return Scores(stats.info, stats=stats, folder=folder, fingerprint=stats_fingerprint(stats))
    gradients = load_gradients(folder, stats.info)
    if gradients is None:
        raise InputError(
            f"statistics {folder} hold no loss gradients, which {request.method.name} scores come "
            "from: make them with `edge-moe calibrate --gradients`, or leave out --stats"
        )
    return Scores(
        gradients.info,
        neurons=gradients.neuron_scores(),
        folder=folder,
        fingerprint=stats_fingerprint(gradients),
    )


def measure_scores(request: Request, folder: Path) -> Scores:
    """Scores from what an interrupted run left in `folder`, or measured now."""
    if request.method.shrinks == "width":
        from edge_moe.converters.gradient_loss import measure_gradients

        gradients = _measured(request, folder / "gradients", GradientStats, measure_gradients)
        return Scores(gradients.info, neurons=gradients.neuron_scores())
    stats = _measured(request, folder / "stats", ExpertStats, calibrate)
    return Scores(stats.info, stats=stats)


def _checked_stats(request: Request, folder: Path) -> ExpertStats:
    stats = ExpertStats.load(folder)
    if stats.info.model_fingerprint != request.checkpoint.fingerprint:
        raise StatsError(
            f"the statistics in {folder} belong to another model than "
            f"{request.checkpoint.folder}: calibrate this one"
        )
    measured, wanted = stats.info.tasks, request.info.tasks
    if request.method.needs_samples and measured != wanted:
        raise StatsError(
            f"the statistics in {folder} are of {', '.join(measured)}, and method "
            f"{request.method.name} would run layers on {', '.join(wanted)}: give --task as it was "
            "calibrated, or statistics of that task"
        )
    return stats


def _measured(
    request: Request, folder: Path, kind: type[StatsT], measure: Callable[..., StatsT]
) -> StatsT:
    """What an interrupted run left in `folder`, or what `measure` finds on the text now."""
    if kind.settings_path(folder).exists():
        return kind.load(folder)
    return measure(
        request.checkpoint.folder,
        request.tasks,
        folder,
        window_tokens=request.limits.window_tokens,
        max_windows=request.limits.max_windows,
        forms=(),
        quantiser=PLAIN_QUANTISER,
    )
