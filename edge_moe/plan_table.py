"""A plan as a page for people, and as a summary for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edge_moe.formats import DROP, form_label, in_order
from edge_moe.plan import FrontierPoint, MemoryTerm, Plan, SearchRecord
from edge_moe.reproduce import command_line, stats_options
from edge_moe.search import MIXED_BITS, PLAN_NAME
from edge_moe.trials import SELECTION_RULE
from edge_moe.units import format_bytes

MAX_FRONTIER_ROWS = 12
MAX_SEARCH_ROWS = 5


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RivalSummary(_Model):
    """Another way to spend the same expert bytes, without its table of forms."""

    name: str
    expert_bytes: int
    loss: float
    note: str


class PlanSummary(_Model):
    """What `edge-moe plan --json` prints; the whole plan is in the file it names."""

    path: str
    model: str
    tasks: list[str]
    target: str
    device: str
    fits: bool
    budget_bytes: int
    total_bytes: int
    context_tokens: int
    terms: list[MemoryTerm]
    shadow: str
    """Form of the shadows; empty for none."""
    shadow_bytes: int
    """On disk, and in memory where experts are paged with shadows."""
    form_counts: dict[str, int]
    """Experts by form, over all layers."""
    loss: float
    loss_unit: str
    frontier: list[FrontierPoint]
    rivals: list[RivalSummary]
    super_experts: list[tuple[int, int]]
    limits: list[str]
    warnings: list[str]
    search: SearchRecord | None


def summarise_plan(plan: Plan, path: Path) -> PlanSummary:
    """The plan, saved at `path`, without its tables of one cell per expert."""
    return PlanSummary(
        path=str(path),
        model=plan.model,
        tasks=plan.tasks,
        target=plan.target,
        device=plan.device,
        fits=plan.total_bytes <= plan.budget_bytes,
        budget_bytes=plan.budget_bytes,
        total_bytes=plan.total_bytes,
        context_tokens=plan.context_tokens,
        terms=plan.terms,
        shadow=plan.shadow,
        shadow_bytes=plan.shadow_bytes,
        form_counts=form_counts(plan.forms),
        loss=plan.loss,
        loss_unit=plan.loss_unit,
        frontier=plan.frontier,
        rivals=[
            RivalSummary(
                name=rival.name, expert_bytes=rival.expert_bytes, loss=rival.loss, note=rival.note
            )
            for rival in plan.rivals
        ],
        super_experts=plan.super_experts,
        limits=plan.limits,
        warnings=plan.warnings,
        search=plan.search,
    )


def form_counts(forms: Sequence[Sequence[str]]) -> dict[str, int]:
    """form -> number of experts, from fewest to most bits."""
    counts = Counter(form for row in forms for form in row)
    return {form: counts[form] for form in in_order(counts)}


def print_plan(plan: Plan, path: Path, console: Console, stats: Path) -> None:
    """Verdict, bytes by term, experts by form, frontier, rivals, limits, and what to do next.

    `stats` is the folder that the plan was made from.
    """
    spare_bytes = plan.budget_bytes - plan.total_bytes
    verdict = (
        f" {format_bytes(plan.budget_bytes)} with {format_bytes(spare_bytes)} to spare: "
        f"{plan.model} for {', '.join(plan.tasks)}, target {plan.target} on {plan.device}, "
        f"{plan.context_tokens:,} tokens of context"
    )
    console.print(Text.assemble(("FITS", "bold green"), verdict))
    console.print(_terms_table(plan))
    console.print(_forms_line(plan))
    if plan.shadow:
        console.print(_shadow_line(plan))
    console.print(_frontier_table(plan))
    if plan.rivals:
        console.print(_rivals_table(plan))
    console.print(f"loss: {plan.loss_unit}", markup=False)
    if plan.search is not None:
        if plan.search.trials:
            console.print(_search_table(plan.search))
        console.print(_search_line(plan.search), markup=False)
    for heading, sentences in (("limit", plan.limits), ("warning", plan.warnings)):
        for sentence in sentences:
            console.print(f"{heading}: {sentence}", style="yellow", markup=False)
    line = command_line("build", path, "-o", "OUT", *stats_options(plan, str(stats)))
    console.print(f"next: {line}", markup=False)


def _terms_table(plan: Plan) -> Table:
    table = _table("Memory")
    table.add_column("term")
    table.add_column("bytes", justify="right")
    table.add_column("share of budget", justify="right")
    table.add_column("source")
    table.add_column("note")
    for term in plan.terms:
        table.add_row(
            term.name,
            format_bytes(term.num_bytes),
            f"{term.num_bytes / plan.budget_bytes:.1%}",
            term.source,
            term.note,
        )
    total = plan.total_bytes
    table.add_row("total", format_bytes(total), f"{total / plan.budget_bytes:.1%}", "", "")
    table.add_row("budget", format_bytes(plan.budget_bytes), "", "", "")
    return table


def _forms_line(plan: Plan) -> str:
    parts = []
    for form, count in form_counts(plan.forms).items():
        one_expert = plan.form_bytes.get(form, 0)
        size = f" of {format_bytes(one_expert)}" if one_expert else ""
        label = "dropped" if form == DROP else f"{form} ({form_label(form)}{size})"
        parts.append(f"{count} {label}")
    num_experts = sum(len(row) for row in plan.forms)
    protected = len(plan.super_experts)
    suffix = f"; {protected} protected as super experts" if protected else ""
    return f"{num_experts} experts: {', '.join(parts)}{suffix}"


def _shadow_line(plan: Plan) -> str:
    return (
        f"shadows: {plan.shadow}, {format_bytes(plan.shadow_bytes)} on disk; in memory, and in the "
        "budget, only where `edge-moe run --stall never` or `bounded` pages"
    )


def _frontier_table(plan: Plan) -> Table:
    table = _table("Frontier: quality against size")
    table.add_column("total", justify="right")
    table.add_column("experts", justify="right")
    table.add_column("loss", justify="right")
    table.add_column("")
    for point in frontier_rows(plan):
        is_chosen = point.total_bytes == plan.total_bytes
        table.add_row(
            format_bytes(point.total_bytes),
            format_bytes(point.expert_bytes),
            f"{point.loss:.3g}",
            "<- this plan" if is_chosen else "",
            style="bold" if is_chosen else None,
        )
    return table


def frontier_rows(plan: Plan) -> list[FrontierPoint]:
    """At most `MAX_FRONTIER_ROWS` evenly spread points by size, and this plan among them."""
    expert_bytes = plan.term("experts").num_bytes
    chosen = FrontierPoint(total_bytes=plan.total_bytes, expert_bytes=expert_bytes, loss=plan.loss)
    others = [point for point in plan.frontier if point.total_bytes != plan.total_bytes]
    others.sort(key=lambda point: point.total_bytes)
    step = max(1, -(-len(others) // (MAX_FRONTIER_ROWS - 1)))
    shown = [*others[::-1][::step], chosen]
    return sorted(shown, key=lambda point: point.total_bytes)


def _rivals_table(plan: Plan) -> Table:
    table = _table("The same bytes, spent otherwise")
    table.add_column("strategy")
    table.add_column("experts", justify="right")
    table.add_column("loss", justify="right")
    table.add_column("x this plan", justify="right")
    table.add_column("note")
    expert_bytes = plan.term("experts").num_bytes
    table.add_row("this plan", format_bytes(expert_bytes), f"{plan.loss:.3g}", "1", "")
    for rival in plan.rivals:
        ratio = f"{rival.loss / plan.loss:.3g}" if plan.loss > 0 else ""
        table.add_row(
            rival.name, format_bytes(rival.expert_bytes), f"{rival.loss:.3g}", ratio, rival.note
        )
    return table


def _search_table(search: SearchRecord) -> Table:
    """The best trials, and the ways that everybody knows."""
    table = _table("Measured: mean KL divergence from the whole model")
    table.add_column("proposed by")
    table.add_column("KLD", justify="right")
    table.add_column("")
    order = sorted(search.trials, key=lambda trial: trial.kld)
    for position, trial in enumerate(order):
        is_chosen = trial.name == search.chosen
        if position < MAX_SEARCH_ROWS or is_chosen or trial.name in (PLAN_NAME, MIXED_BITS):
            mark = "<- this plan" if is_chosen else ""
            table.add_row(trial.name, f"{trial.kld:.3g}", mark, style="bold" if is_chosen else None)
    return table


def _search_line(search: SearchRecord) -> str:
    ending = f"; {search.early_end}" if search.early_end else ""
    if ending and not search.failure:
        ending += ": --search-seconds gives more"
    count = len(search.trials)
    return (
        f"search: {count} plan{'s' * (count != 1)} measured in {search.seconds:.0f} s on "
        f"{search.text or 'held-out text'}; {SELECTION_RULE}{ending}"
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
