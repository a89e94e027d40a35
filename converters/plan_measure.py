"""Measures proposed plans for the search: KL divergence on held-out text, within a time limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.calibrate import text_packer
from edge_moe.converters.variants import PackedExperts, VariantScorer
from edge_moe.errors import InputError
from edge_moe.plan import SearchRecord
from edge_moe.runtime.heldout import SEARCH_PART, part_of_heldout
from edge_moe.runtime.session import load_tokenizer
from edge_moe.stats import StatsInfo
from edge_moe.tasks import task_argument
from edge_moe.trials import TimeUp


class PlanMeasure:
    """Callable that measures plans of one checkpoint until its time is up."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        stats: StatsInfo,
        tasks: Sequence[str],
        seconds: float,
        on_share: Callable[[float], None] = lambda _: None,
        packed: PackedExperts | None = None,
    ) -> None:
        """`on_share` is told the share of `seconds` that has passed, after every layer.

        `packed` are experts packed as `stats` says, where somebody has them already.

        Raises:
            InputError: a task without held-out text, or no time.
        """
        if seconds <= 0:
            raise InputError(f"{seconds:g} seconds of search are none: use --no-search instead")
        tokenizer = load_tokenizer(checkpoint.folder)
        windows = part_of_heldout(tasks, tokenizer, SEARCH_PART)
        self.text = (
            f"{sum(map(len, windows))} tokens of held-out {', '.join(tasks)}, odd windows only"
        )
        if packed is None:
            packer = text_packer(checkpoint, stats.options, stats.data_fingerprint)
            packed = PackedExperts(checkpoint, packer)
        self._scorer = VariantScorer(checkpoint, windows, packed)
        self._tasks = tuple(tasks)
        self._seconds = seconds
        self._start = time.monotonic()
        self._is_first = True
        self._on_share = on_share

    def __call__(self, proposals: Mapping[str, list[list[str]]]) -> Mapping[str, float]:
        """Mean KL divergence of every proposal.

        The clock starts anew after the first call, in which experts are packed that later ones
        share: it may take `seconds`, too.

        Raises:
            TimeUp: the time ran out before the last layer.
        """
        scores = self._scorer.score(proposals, self._check_time)
        if self._is_first:
            self._is_first, self._start = False, time.monotonic()
        return {name: float(found.kld.mean()) for name, found in scores.items()}

    def described(self, record: SearchRecord) -> SearchRecord:
        """`record` with the text that was measured on and the time that was allowed."""
        tasks = [task_argument(task) for task in self._tasks]
        known = {"text": self.text, "tasks": tasks, "limit_seconds": self._seconds}
        return record.model_copy(update=known)

    def _check_time(self, share_of_pass: float) -> None:
        passed = (time.monotonic() - self._start) / self._seconds
        self._on_share(min(1.0, passed))
        if passed > 1 and share_of_pass < 1:
            raise TimeUp
