"""A comparison as a table: the best method of every kind at every size, beside the plan."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from edge_moe.compare.contenders import Kind
from edge_moe.compare.record import Cell, Score

RIVALS = tuple(kind for kind in Kind if kind is not Kind.PLAN)


def print_comparison(cells: Sequence[Cell], console: Console) -> None:
    """One row per kind of method and cell: its best method, as Markdown."""
    table = Table(box=box.MARKDOWN)
    for heading in ("task", "experts' bytes", "kind", "best of it"):
        table.add_column(heading)
    for heading in ("bytes", "KL in task", "x plan's", "same top", "PPL in task", "KL off task"):
        table.add_column(heading, justify="right")
    for cell in cells:
        for index, score in enumerate(_best_of_each(cell)):
            size = f"{cell.share:.1%}, {cell.target}"
            table.add_row(
                "" if index else cell.task,
                "" if index else size,
                f"{score.kind} ({_count(cell, score.kind)})",
                score.name,
                f"{score.expert_bytes / cell.full_expert_bytes:.1%}",
                f"{score.in_task.kld}",
                f"{times_plan(cell, score):.2f}",
                f"{score.in_task.same_top.value:.1%}",
                f"{score.in_task.ppl}",
                "-" if score.off_task is None else f"{score.off_task.kld}",
            )
        base = f"{cell.in_task_base_ppl}"
        table.add_row("", "", "whole model", "16 bits", "100.0%", "0", "", "", base, "")
    console.print(table)
    for cell in cells:
        for remark in filter(None, (search_remark(cell), *cell.missing)):
            console.print(remark, markup=False)


def times_plan(cell: Cell, score: Score) -> float:
    """How many times the plan's KL divergence this method has."""
    plan = cell.plan.in_task.kld.value
    if score.in_task.kld.value == plan:
        return 1.0
    return score.in_task.kld.value / plan if plan > 0 else float("inf")


def _best_of_each(cell: Cell) -> list[Score]:
    found = [cell.random_mean() if kind is Kind.RANDOM else cell.best(kind) for kind in RIVALS]
    return [cell.plan, *(score for score in found if score is not None)]


def _count(cell: Cell, kind: Kind) -> int:
    return sum(score.kind is kind for score in cell.scores)


def search_remark(cell: Cell) -> str:
    """A sentence where the search ran out of time; empty otherwise."""
    if cell.search.is_complete:
        return ""
    return (
        f"{cell.task} {cell.share:.1%} {cell.target}: the search ran out of its "
        f"{cell.options.search_seconds:g} s after {len(cell.search.trials)} plans"
    )
