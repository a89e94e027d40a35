"""A comparison as a table: the best method of every kind at every size, beside the plan."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from edge_moe.compare.contenders import Kind
from edge_moe.compare.record import Cell, Score
from edge_moe.metrics import Estimate

RIVALS = tuple(kind for kind in Kind if kind is not Kind.PLAN)


def print_comparison(cells: Sequence[Cell], console: Console) -> None:
    """One row per kind of method and cell: its best method, as Markdown."""
    table = Table(box=box.MARKDOWN)
    for heading in ("task", "experts' bytes", "kind", "best of it"):
        table.add_column(heading)
    for heading in ("KL in task", "x plan's", "same top", "PPL in task", "KL off task"):
        table.add_column(heading, justify="right")
    for cell in cells:
        for index, score in enumerate(_best_of_each(cell)):
            size = f"{cell.share:.1%}, {cell.target}"
            table.add_row(
                "" if index else cell.task,
                "" if index else size,
                f"{score.kind} ({_count(cell, score.kind)})",
                score.name,
                f"{score.in_task.kld}",
                f"{times_plan(cell, score):.2f}",
                f"{score.in_task.same_top.value:.1%}",
                f"{score.in_task.ppl}",
                "-" if score.off_task is None else f"{score.off_task.kld}",
            )
        table.add_row("", "", "whole model", "16 bits", "0", "", "", f"{cell.in_task_base_ppl}", "")
    console.print(table)


def times_plan(cell: Cell, score: Score) -> float:
    """How many times the plan's KL divergence this method has."""
    plan = cell.plan.in_task.kld.value
    return score.in_task.kld.value / plan if plan > 0 else float("inf")


def _best_of_each(cell: Cell) -> list[Score]:
    found = [cell.plan, *(cell.best(kind) for kind in RIVALS)]
    return [_mean_of_draws(cell) if _is_random(each) else each for each in found if each]


def _is_random(score: Score) -> bool:
    return score.kind is Kind.RANDOM


def _mean_of_draws(cell: Cell) -> Score:
    """The random draws at the number of bits that did best, as one score: their mean."""
    best = cell.best(Kind.RANDOM)
    if best is None:
        raise ValueError("no random draw")
    bits = best.name.split(",")[-1]
    draws = [
        score for score in cell.scores if _is_random(score) and score.name.split(",")[-1] == bits
    ]
    klds = [draw.in_task.kld.value for draw in draws]
    mean = sum(klds) / len(klds)
    spread = (sum((each - mean) ** 2 for each in klds) / max(1, len(klds) - 1)) ** 0.5
    in_task = best.in_task.model_copy(update={"kld": Estimate(mean, spread)})
    name = f"mean and spread of {len(draws)} draws,{bits}"
    return best.model_copy(update={"name": name, "in_task": in_task})


def _count(cell: Cell, kind: Kind) -> int:
    return sum(score.kind is kind for score in cell.scores)
