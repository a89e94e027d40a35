"""The importance of columns for packing a GGUF's experts anew: second moments of a calibration."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_moe.converters.slice_packing import InputSquares
from edge_moe.errors import PlanError
from edge_moe.moments import LayerMoments, load_moments
from edge_moe.plan import Plan
from edge_moe.planner import stats_fingerprint
from edge_moe.spec import ModelSpec
from edge_moe.stats import ExpertStats


def stored_squares(folder: Path, plan: Plan, spec: ModelSpec) -> InputSquares:
    """Sums of squares of each matrix's input, from the statistics that `plan` was made with.

    Every token that chose the expert counts alike, as in llama.cpp's importance matrices. Memory:
    the moments of one layer.

    Raises:
        StatsError: the folder holds no statistics, or a layer's moments are missing.
        PlanError: the statistics are not those of the plan.
    """
    found = stats_fingerprint(ExpertStats.load(folder))
    if found != plan.stats_fingerprint:
        raise PlanError(
            f"the plan was made with other statistics (fingerprint {plan.stats_fingerprint[:12]}) "
            f"than {folder} holds ({found[:12]}): give the folder that `edge-moe plan` was given"
        )
    return squares_in(folder, spec)


def squares_in(folder: Path, spec: ModelSpec) -> InputSquares:
    """The same of any statistics of the model."""

    @lru_cache(maxsize=1)
    def of_layer(layer_id: int) -> LayerMoments:
        return load_moments(folder, layer_id, spec)

    def squares(layer_id: int, expert_id: int, is_down: bool) -> npt.NDArray[np.floating]:
        outer, inner = of_layer(layer_id).of_expert(expert_id)
        return inner if is_down else outer

    return squares
