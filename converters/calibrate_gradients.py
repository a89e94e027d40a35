"""`calibrate --gradients`: both kinds of statistics in one folder, every expert packed once.

The gradients come first: packing and running every expert in every form is most of the work, and
their pass keeps what the other needs of it. Both passes run the same windows and pack by the same
quantiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_moe.converters.calibrate import calibrate
from edge_moe.converters.gradient_loss import measure_gradients
from edge_moe.gradient_stats import GradientStats
from edge_moe.stats import ExpertStats


def calibrate_with_gradients(
    model: Path,
    tasks: Sequence[str],
    output: Path,
    *,
    window_tokens: int = 512,
    max_windows: int | None = None,
    shard: tuple[int, int] = (0, 1),
    forms: Sequence[str] | None = None,
    quantiser: str | None = None,
) -> ExpertStats:
    """As `calibrate`, with the gradient statistics of the same windows beside them in `output`.

    Finished statistics of the same settings without gradients get them added. A killed run goes on
    in the pass where it stopped. Memory: `gradient_terms`, and later `calibration_terms`, stated
    when each pass begins. Disk: the hidden states of all windows, once per layer, while it runs.

    Raises:
        EdgeMoeError: as for `calibrate`; or `output` holds statistics of another run.
    """

    def measure() -> None:
        measure_gradients(
            model,
            tasks,
            output,
            window_tokens=window_tokens,
            max_windows=max_windows,
            shard=shard,
            forms=forms,
            quantiser=quantiser,
        )

    has_gradients = GradientStats.settings_path(output).exists()
    if not has_gradients:
        measure()
        if ExpertStats.settings_path(output).exists():
            return ExpertStats.load(output)
    return calibrate(
        model,
        tasks,
        output,
        window_tokens=window_tokens,
        max_windows=max_windows,
        shard=shard,
        forms=forms,
        quantiser=quantiser,
    )
