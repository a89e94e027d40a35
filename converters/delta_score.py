"""How well a base does with a delta on a task's text: what chooses the scale, as ComPEFT does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_moe import metrics
from edge_moe.converters.make_delta import Score
from edge_moe.runtime.session import Session
from edge_moe.runtime.tokenizer import load_tokenizer
from edge_moe.tasks import task_windows

WINDOW_TOKENS = 256
MAX_WINDOWS = 8


def text_score(base: Path, tasks: Sequence[str], *, budget_bytes: int | None) -> Score:
    """Mean loss per token on calibration text of `tasks`, never on what they hold out.

    Every call opens the base anew, within `budget_bytes`.

    Raises:
        InputError: too little text.
    """
    tokenizer = load_tokenizer(base)
    windows = task_windows(tasks, "calibration", tokenizer, WINDOW_TOKENS, MAX_WINDOWS)

    def score(delta: Path) -> float:
        with Session.open(
            base,
            delta=delta,
            budget_bytes=budget_bytes,
            context_tokens=WINDOW_TOKENS,
            scored_tokens=WINDOW_TOKENS,
            kernels="exact",
            prefetch=False,
        ) as session:
            losses = [metrics.token_nll(session.logits(window), window) for window in windows]
        return float(np.concatenate(losses).mean())

    return score
