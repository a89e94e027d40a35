"""What all cells of one comparison share: statistics, packed experts, text and its reference."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from edge_moe.checkpoint import Checkpoint
from edge_moe.compare.record import CompareOptions, task_key
from edge_moe.converters.calibrate import calibration_text, text_packer
from edge_moe.converters.calibrate_gradients import calibrate_with_gradients
from edge_moe.converters.calibration_request import checked_forms
from edge_moe.converters.variants import PackedExperts, VariantScorer
from edge_moe.demo import task_names
from edge_moe.gradient_stats import GradientStats, load_gradients
from edge_moe.runtime.heldout import REPORT_PART, part_of_heldout
from edge_moe.spec import ModelSpec
from edge_moe.stats import ExpertStats, StatsInfo, first_difference

WINDOW_TOKENS = 512
"""Of calibration text; the default of `edge-moe calibrate`."""


@dataclass(frozen=True, eq=False)
class Bench:
    """What is measured once per task."""

    checkpoint: Checkpoint
    task: str
    options: CompareOptions
    stats: ExpertStats
    gradients: GradientStats | None
    stats_folder: Path
    packed: PackedExperts
    windows: list[list[int]]
    num_own: int
    """Windows of the task itself; they come first."""
    scorer: VariantScorer
    whole: Sequence[Tensor]

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        task: str,
        work: Path,
        options: CompareOptions,
        own: list[list[int]],
        others: list[list[int]],
    ) -> Bench:
        """Calibrate, unless that is done, and run the whole model on all windows."""
        folder = work / f"stats-{task_key(task)}"
        stats = load_or_calibrate(checkpoint, task, folder, options)
        packer = text_packer(checkpoint, stats.info.options, stats.info.data_fingerprint)
        packed = PackedExperts(checkpoint, packer)
        windows = [*own, *others]
        scorer = VariantScorer(checkpoint, windows, packed)
        return cls(
            checkpoint=checkpoint,
            task=task,
            options=options,
            stats=stats,
            gradients=load_gradients(folder, stats.info),
            stats_folder=folder,
            packed=packed,
            windows=windows,
            num_own=len(own),
            scorer=scorer,
            whole=scorer.run_whole(),
        )

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    @property
    def num_own_tokens(self) -> int:
        """Predicted tokens of the task's windows."""
        return sum(len(window) - 1 for window in self.windows[: self.num_own])


def load_or_calibrate(
    checkpoint: Checkpoint, task: str, folder: Path, options: CompareOptions
) -> ExpertStats:
    """Statistics with gradients: those in `folder` where they are of the same text and settings."""
    if (folder / "stats.json").exists():
        wanted = calibration_settings(checkpoint, task, options)
        stats = ExpertStats.load(folder)
        if first_difference(stats.info, wanted, {"options"}) is None:
            return stats
        shutil.rmtree(folder)  # of other text or settings
    return calibrate_with_gradients(
        checkpoint.folder,
        [task],
        folder,
        window_tokens=WINDOW_TOKENS,
        max_windows=options.calibration_windows,
    )


def calibration_settings(checkpoint: Checkpoint, task: str, options: CompareOptions) -> StatsInfo:
    """What the statistics of `task` are made of, its calibration text included."""
    forms = checked_forms(checkpoint.spec, None)
    info, _ = calibration_text(
        checkpoint, [task], WINDOW_TOKENS, options.calibration_windows, (0, 1), forms
    )
    return info


def compared_windows(
    task: str, tokenizer: object, options: CompareOptions
) -> tuple[list[list[int]], list[list[int]]]:
    """(held-out windows of the task, and of every other shipped task)."""
    own = part_of_heldout([task], tokenizer, REPORT_PART, options.max_windows)
    others: list[list[int]] = []
    for name in task_names():
        if name != task and options.off_task_windows > 0:
            others += part_of_heldout([name], tokenizer, REPORT_PART, options.off_task_windows)
    return own, others
