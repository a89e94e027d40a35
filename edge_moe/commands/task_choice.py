"""`edge-moe run --task`: which task's experts to load, and why."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edge_moe.commands.generation import Prompt
from edge_moe.commands.options import stderr
from edge_moe.errors import InputError
from edge_moe.units import format_bytes

if TYPE_CHECKING:
    from edge_moe.runtime.session import Session
    from edge_moe.task_pattern import TaskPattern

AUTO = "auto"


def known_patterns(model: Path, task: str | None, folder: Path | None) -> dict[str, TaskPattern]:
    """The patterns of `model` by name; none where no task is asked for.

    Raises:
        InputError: no pattern for this model, or none called `task`.
    """
    if task is None:
        if folder is not None:
            raise InputError(f"--patterns {folder} is given without --task: add --task auto")
        return {}
    from edge_moe.profiles import load_patterns
    from edge_moe.runtime.allotment import open_source, source_fingerprint

    known = load_patterns(source_fingerprint(open_source(model)), folder)
    if not known:
        place = folder or "the shipped patterns"
        raise InputError(
            f"{place} hold none for {model}: make some with `edge-moe patterns` and name their "
            "folder with --patterns"
        )
    if task != AUTO and task not in known:
        raise InputError(f"task {task!r} has no pattern for {model}; known: {', '.join(known)}")
    return known


def choose_task(
    session: Session, task: str, known: Mapping[str, TaskPattern], prompt: Prompt
) -> None:
    """Find the task of `prompt` if it is to be found, keep its experts only, and say so."""
    if task == AUTO:
        start = time.perf_counter()
        prompt_ids = session.prompt_ids(prompt)
        match = session.match_task(prompt_ids, known)
        paged = format_bytes(session.statistics().page_in_bytes)
        stderr().print(match.describe())
        stderr().print(
            f"matched in {time.perf_counter() - start:.2f} s: one prefill of {len(prompt_ids)} "
            f"tokens, {paged} paged in",
            style="dim",
        )
        task = match.chosen
        session.use_pattern(known[task])
    kept = sum(map(len, session.kept))
    total = session.num_experts
    stderr().print(f"task {task}: {kept} of {total} experts kept", style="dim")
