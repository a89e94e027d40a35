"""Held-out text as token windows: which of it chooses between plans, and which is reported on.

A search measures plans on every other window; what it chose is then scored on the others, for the
best of many looks better than it is on the text that picked it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edge_moe.errors import InputError
from edge_moe.gguf_split import is_gguf_name
from edge_moe.package import PLAN_NAME
from edge_moe.plan import Plan, SearchRecord
from edge_moe.tasks import load_task_texts, task_argument, task_label, token_windows

T = TypeVar("T")

WINDOW_TOKENS = 256
LEAST_SEARCH_WINDOWS, MOST_SEARCH_WINDOWS = 16, 48
SEARCH_PLAN_OPERATIONS = 5e11
"""Between those limits a search takes as many windows as one plan is run on with so many."""
SEARCH_PART, REPORT_PART = 1, 0
"""Held-out windows with odd numbers choose between plans, even ones are left to report on."""


@dataclass(frozen=True)
class ScoredText:
    """What `eval` scores of a task."""

    windows: list[list[int]]
    window_tokens: int
    num_search_windows: int
    """Held-out windows that are left out since a search chose the plan by them."""


def heldout_windows(
    task: str, tokenizer: Any, window_tokens: int, max_windows: int | None
) -> list[list[int]]:
    """The task's held-out text as token windows; with `max_windows`, evenly spread ones.

    Raises:
        InputError: the task has fewer than three tokens of held-out text.
    """
    windows = token_windows(load_task_texts(task, "heldout", tokenizer), tokenizer, window_tokens)
    windows = spread(windows, max_windows)
    if sum(len(window) - 1 for window in windows) < 2:
        raise InputError(f"task {task!r} has too little held-out text: give at least 3 tokens")
    return windows


def search_windows(tasks: Sequence[str], tokenizer: Any, active_parameters: int) -> list[list[int]]:
    """What a search measures the plans of a model on: more text where it is cheap.

    The KL divergence of a good plan hangs on a few tokens, so more of them choose better; a token
    costs two operations per parameter that it uses.

    Raises:
        InputError: a task without held-out text.
    """
    afforded = int(SEARCH_PLAN_OPERATIONS / (2 * active_parameters * WINDOW_TOKENS))
    max_windows = min(max(afforded, LEAST_SEARCH_WINDOWS), MOST_SEARCH_WINDOWS)
    return part_of_heldout(tasks, tokenizer, SEARCH_PART, max_windows)


def part_of_heldout(
    tasks: Sequence[str], tokenizer: Any, part: int, max_windows: int | None
) -> list[list[int]]:
    """Every other held-out window of `tasks`: the half that searches, or the half that reports.

    A task of a single window gives it to both.

    Raises:
        InputError: a task without held-out text.
    """
    found: list[list[int]] = []
    for task in tasks:
        half = _half(heldout_windows(task, tokenizer, WINDOW_TOKENS, None), part)
        limit = len(half) if max_windows is None else max(1, max_windows // len(tasks))
        found += spread(half, limit)
    return found


def described_search(
    record: SearchRecord, windows: Sequence[Sequence[int]], tasks: Sequence[str]
) -> SearchRecord:
    """`record` with the text that it measured on: `windows` of `search_windows`."""
    text = f"{sum(map(len, windows))} tokens of held-out {', '.join(tasks)}, odd windows only"
    known = [task_argument(task) for task in tasks]
    return record.model_copy(update={"text": text, "tasks": known})


def text_to_score(
    model: Path, task: str, tokenizer: Any, window_tokens: int, max_windows: int | None
) -> ScoredText:
    """The task's held-out text without what chose the plan that `model` was built from.

    Where that plan was searched on this task, windows are at most `WINDOW_TOKENS` long.

    Raises:
        InputError: the task has too little held-out text.
    """
    plan = plan_beside(model)
    searched = plan.search.tasks if plan is not None and plan.search is not None else []
    if task_argument(task) not in searched:
        return ScoredText(
            heldout_windows(task, tokenizer, window_tokens, max_windows), window_tokens, 0
        )
    size = min(window_tokens, WINDOW_TOKENS)
    whole = heldout_windows(task, tokenizer, WINDOW_TOKENS, None)
    kept = _half(whole, REPORT_PART)
    pieces = [
        window[start : start + size] for window in kept for start in range(0, len(window), size)
    ]
    windows = spread([piece for piece in pieces if len(piece) > 1], max_windows)
    return ScoredText(windows, size, len(whole) - len(kept))


def plan_beside(model: Path) -> Plan | None:
    """The plan that `model` was built from, where it lies beside it."""
    path = (model.parent if is_gguf_name(model) else model) / PLAN_NAME
    return Plan.load(path) if path.exists() else None


def is_in_task(model: Path, task: str) -> bool | None:
    """Whether `model` was shrunken for `task`, from the plan beside it; None without a plan."""
    plan = plan_beside(model)
    return None if plan is None else task_label(task) in plan.tasks


def _half(windows: list[list[int]], part: int) -> list[list[int]]:
    """Every other window; a single one is both halves."""
    return windows[part::2] or windows


def spread(items: list[T], most: int | None) -> list[T]:
    """At most so many of `items`, evenly spread."""
    if most is None or len(items) <= most:
        return items
    return [items[index * len(items) // most] for index in range(most)]
