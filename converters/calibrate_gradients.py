"""`calibrate --gradients`: both kinds of statistics in one folder, every expert packed once.

The gradients come first: packing and running every expert in every form is most of the work, and
their pass keeps what the other needs of it. Both passes run the same windows and pack by the same
quantiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from edge_moe.converters.calibrate import calibrate
from edge_moe.converters.calibration_request import CalibrationArguments
from edge_moe.converters.gradient_loss import measure_gradients
from edge_moe.gradient_stats import GradientStats
from edge_moe.stats import ExpertStats


def calibrate_with_gradients(
    model: Path, tasks: Sequence[str], output: Path, **arguments: Unpack[CalibrationArguments]
) -> ExpertStats:
    """As `calibrate`, with the gradient statistics of the same windows beside them in `output`.

    Finished statistics of the same settings without gradients get them added. A killed run goes on
    in the pass where it stopped. Memory: `gradient_terms`, and later `calibration_terms`, stated
    when each pass begins. Disk: the hidden states of all windows, once per layer, while it runs.

    Raises:
        EdgeMoeError: as for `calibrate`; or `output` holds statistics of another run.
    """
    if not GradientStats.settings_path(output).exists():
        measure_gradients(model, tasks, output, **arguments)
        if ExpertStats.settings_path(output).exists():
            return ExpertStats.load(output)
    return calibrate(model, tasks, output, **arguments)
