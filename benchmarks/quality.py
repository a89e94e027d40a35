"""What `edge-moe compare` measured: how far ahead the plan is in every cell, and a plot.

    edge-moe compare MODEL --task code ... -o benchmarks/results/quality-demo
    python benchmarks/quality.py benchmarks/results/quality-demo

Prints one Markdown row per cell, one per size, what each part of the planner is worth, and writes
FOLDER.svg: KL divergence against the experts' bytes, a thin line per method in the colour of its
kind, a thick one for edge-moe. The plot needs the extra `bench`.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from math import inf
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from edge_moe.compare.contenders import Kind
from edge_moe.compare.record import Cell, Score, load_cells
from edge_moe.compare.table import search_remark, times_plan
from edge_moe.published import GEMQ_NAME, PMQ_NAME

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SINGLE = (Kind.PRUNE, Kind.MERGE, Kind.QUANTISE, Kind.RANDOM)
"""Methods that do one thing: drop, merge, or one type for all."""
PUBLISHED_MIXED = (PMQ_NAME, GEMQ_NAME)
PLAIN = "gradients, first order"
RIVALS: dict[str, Sequence[Kind] | str] = {
    "best single method": SINGLE,
    "best criterion": (Kind.PRUNE,),
    "one type for all": (Kind.QUANTISE,),
    "MC-MoE": PMQ_NAME,
    "GEMQ": GEMQ_NAME,
    "mixed bits, none dropped": (Kind.MIXED,),
}
"""What stands beside the plan: kinds of methods, or one by name."""
LEAST_SPENT = 0.9
"""A method that cannot spend this share of the bytes is no rival at them."""
COLOURS = {
    Kind.PLAN: "#000000",
    Kind.PRUNE: "#d1495b",
    Kind.MERGE: "#edae49",
    Kind.QUANTISE: "#00798c",
    Kind.MIXED: "#7b5ea7",
    Kind.RANDOM: "#aaaaaa",
}


def print_summary(cells: Sequence[Cell], console: Console) -> None:
    """How many times the plan's KL divergence the best of each kind has."""
    table = Table(box=box.MARKDOWN)
    for heading in ("task", "experts' bytes", "plan's KL", "same top"):
        table.add_column(heading)
    for heading in ("best single method", "MC-MoE", "GEMQ", "mixed bits, none dropped"):
        table.add_column(heading, justify="right")
    for cell in cells:
        plan = cell.plan
        table.add_row(
            cell.task,
            f"{cell.share:.1%}, {cell.target}",
            f"{plan.in_task.kld}",
            f"{plan.in_task.same_top.value:.1%}",
            _best_single(cell),
            *(_spread([_ratio(cell, which)]) for which in (*PUBLISHED_MIXED, (Kind.MIXED,))),
        )
    console.print(table)
    behind = [cell for cell in cells if _best_rival(cell) < _kld(cell.plan)]
    console.print(
        f"lowest KL in {len(cells) - len(behind)} of {len(cells)} cells"
        + "".join(f"; behind in {cell.task} {cell.share:.1%} {cell.target}" for cell in behind)
    )

    console.print(f"- : does not exist there, or spends less than {LEAST_SPENT:.0%} of the bytes")
    for cell in cells:
        if remark := search_remark(cell):
            console.print(remark)
        if not cell.options.transforms:
            console.print(f"{cell.task} {cell.share:.1%} {cell.target}: without merging methods")


def print_by_size(cells: Sequence[Cell], console: Console) -> None:
    """All tasks together: geometric mean, least and most of what the best of a kind loses."""
    table = Table(box=box.MARKDOWN)
    for heading in ("experts' bytes", "plan's KL", "same top, least"):
        table.add_column(heading)
    for heading in RIVALS:
        table.add_column(heading, justify="right")
    sizes = {(cell.target, cell.share): None for cell in cells}
    for target, share in sizes:
        found = [cell for cell in cells if (cell.target, cell.share) == (target, share)]
        klds = [_kld(cell.plan) for cell in found]
        table.add_row(
            f"{share:.1%}, {target}, {len(found)} tasks",
            f"{min(klds):.2g} - {max(klds):.2g}",
            f"{min(cell.plan.in_task.same_top.value for cell in found):.1%}",
            *(_spread([_ratio(cell, kinds) for cell in found]) for kinds in RIVALS.values()),
        )
    console.print(table)


def _ratio(cell: Cell, which: Sequence[Kind] | str) -> float | None:
    """How many times the plan's KL the best of some kinds, or the method of a name, has."""
    score = _named(cell, which) if isinstance(which, str) else cell.best(*which)
    if score is None or (
        isinstance(which, str) and score.expert_bytes < LEAST_SPENT * cell.budget_bytes
    ):
        return None
    return times_plan(cell, score)


def _spread(ratios: Sequence[float | None]) -> str:
    """Geometric mean, least and most of `ratios`; how many are left out, 0 and infinity among them.

    None is a method that does not exist at the size, or cannot spend its bytes.
    """
    known = [ratio for ratio in ratios if ratio is not None and 0 < ratio < inf]
    if not known:
        return "-"
    out = f", {len(ratios) - len(known)} left out" if len(known) < len(ratios) else ""
    if len(ratios) == 1:
        return f"{known[0]:.1f} x"
    return f"{geometric_mean(known):.1f} x ({min(known):.1f} - {max(known):.1f}{out})"


def print_parts(cells: Sequence[Cell], console: Console) -> None:
    """What each part of the planner is worth: KL on reported text over the plain program's.

    The plain program is `PLAIN`, the default with gradients; rounds of the search start from it.
    """
    table = Table(box=box.MARKDOWN)
    for heading in ("part", "cells", "KL, geometric mean", "lower", "higher"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for cell in cells:
        found = {part.name: _kld(part) for part in cell.parts}
        for name, kld in found.items():
            pairs[name].append((kld, found[PLAIN]))
    for name, klds in pairs.items():
        ratios = [kld / plain for kld, plain in klds if kld > 0 and plain > 0]
        mean = f"{geometric_mean(ratios):.3f}" if ratios else "-"
        lower = sum(kld < plain for kld, plain in klds)
        higher = sum(kld > plain for kld, plain in klds)
        table.add_row(name, f"{len(klds)}", mean, f"{lower}", f"{higher}")
    console.print(table)


def _best_rival(cell: Cell) -> float:
    """The lowest KL of what is not the plan; infinity where nothing else exists at the size."""
    rivals = [_kld(score) for score in cell.scores if score.kind is not Kind.PLAN]
    return min(rivals, default=inf)


def plot(cells: Sequence[Cell], path: Path) -> None:
    """One panel per task, written as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "edge-moe"  # the same picture is the same file
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    tasks = sorted({cell.task for cell in cells})
    rows = -(-len(tasks) // 3)
    size = 4 * min(3, len(tasks)) + 0.5, 3.2 * rows + 0.6
    figure, axes = pyplot.subplots(
        rows, min(3, len(tasks)), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        _panel(axis, [cell for cell in cells if cell.task == task])
        axis.set_title(Path(task).stem)
    handles = [
        Line2D([], [], color=colour, linewidth=3 if kind is Kind.PLAN else 1.5, label=kind)
        for kind, colour in COLOURS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    figure.supylabel("KL divergence from the whole model, nats per token", fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def _panel(axis: Axes, cells: Sequence[Cell]) -> None:
    lines: dict[tuple[Kind, str], list[tuple[float, float]]] = defaultdict(list)
    for cell in cells:
        for score in cell.scores:
            point = 100 * score.expert_bytes / cell.full_expert_bytes, _kld(score)
            name = "" if score.kind is Kind.QUANTISE else score.name  # all types are one line
            lines[score.kind, name].append(point)
    for (kind, name), points in lines.items():
        if name == "edge-moe plan, no search":
            continue
        is_plan = kind is Kind.PLAN
        axis.plot(
            *zip(*sorted(set(points)), strict=True),
            color=COLOURS[kind],
            linewidth=3 if is_plan else 0.8,
            alpha=1 if is_plan else 0.6,
            marker="o",
            markersize=5 if is_plan else 2.5,
            zorder=3 if is_plan else 2,
        )
    axis.set_yscale("log")
    axis.set_xlabel("% of the experts' 16-bit bytes", fontsize=9)
    axis.grid(visible=True, which="major", linewidth=0.3)


def _kld(score: Score) -> float:
    return score.in_task.kld.value


def _named(cell: Cell, name: str) -> Score | None:
    return next((score for score in cell.scores if score.name == name), None)


def _best_single(cell: Cell) -> str:
    best = cell.best(*SINGLE)
    return "-" if best is None else f"{times_plan(cell, best):.1f} x ({best.name})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Sum up and plot a comparison.")
    parser.add_argument("folder", type=Path, help="what `edge-moe compare -o` wrote")
    parser.add_argument("--no-plot", action="store_true")
    args = parser.parse_args()
    cells = load_cells(args.folder)
    console = Console(width=200)
    print_summary(cells, console)
    print_by_size(cells, console)
    print_parts(cells, console)
    native = [cell for cell in cells if cell.target == "native"]
    if native and not args.no_plot:
        plot(native, args.folder.with_suffix(".svg"))


if __name__ == "__main__":
    main()
