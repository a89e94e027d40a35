"""The report as text: what a person reads before opening the page."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edge_moe.formats import form_bits, in_order
from edge_moe.report import facts
from edge_moe.report.data import ReportData
from edge_moe.search import MIXED_BITS, PLAN_NAME

_TONES = {"good": "bold green", "bad": "bold red", "": "bold"}
_MAP_COLUMNS = 64  # wider maps are left to the HTML page
_MAX_TRIALS = 3
_SHADES = ((0.0, "·"), (3.0, "░"), (5.0, "▒"), (9.0, "▓"))
"""Most bits per weight -> shade."""


def print_facts(data: ReportData, console: Console) -> None:
    """Print verdict, bill, experts, quality, speed and what to know."""
    console.print(Text(facts.title(data), style="dim"))
    verdict = Text()
    for part in facts.verdict(data):
        verdict.append(part["text"] + " ", style=_TONES[part["tone"]])
    console.print(verdict)
    console.print(_bill(data))
    _print_experts(data, console)
    if data.plan.search is not None:
        _print_search(data, console)
    if data.evals:
        console.print(_quality(data))
        if facts.problem_table(data):
            console.print(_problems(data))
    else:
        console.print(f"quality not measured yet: {facts.eval_command(data)}", style="dim")
    if data.run is not None:
        console.print(f"decoding {data.run.tokens_per_second:.1f} tokens per second")
    elif command := facts.record_command(data):
        console.print(f"memory not measured yet: {command}", style="dim")
    for remark in (*data.plan.limits, *data.plan.warnings):
        console.print(f"note: {remark}", style="yellow", highlight=False)


def _bill(data: ReportData) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("memory")
    for heading in ("planned", "measured", "error"):
        table.add_column(heading, justify="right")
    table.add_column("planned from", style="dim")
    table.add_column("measured from", style="dim")
    for row in facts.term_table(data):
        table.add_row(
            row["name"],
            row["planned"],
            row["measured"],
            row["error"],
            row["source"],
            row["how"],
            style="bold" if row["is_total"] else None,
        )
    return table


def _print_experts(data: ReportData, console: Console) -> None:
    every = [form for row in data.plan.forms for form in row]
    counts = ", ".join(f"{every.count(form)} {form}" for form in in_order(every))
    console.print(f"experts: {counts}", highlight=False)
    if len(data.plan.forms[0]) > _MAP_COLUMNS or len(data.plan.forms) > 16:
        return
    for layer_id, row in zip(data.plan.moe_layer_ids, data.plan.forms, strict=True):
        cells = "".join(_shade(form) for form in row)
        console.print(f"  layer {layer_id:>3} {cells}", highlight=False)
    console.print("  · dropped  ░ to 2 bits  ▒ 3-4  ▓ 5-8  █ 16", style="dim")


def _print_search(data: ReportData, console: Console) -> None:
    """The best of the plans that were measured, and the ways that everybody knows."""
    console.print(f"search: {facts.search_line(data)}", highlight=False, markup=False)
    if not facts.search_table(data):
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("proposed by")
    table.add_column("KLD", justify="right")
    table.add_column("")
    for position, row in enumerate(facts.search_table(data)):
        if position < _MAX_TRIALS or row["mark"] or row["name"] in (PLAN_NAME, MIXED_BITS):
            table.add_row(row["name"], row["kld"], row["mark"])
    console.print(table)


def _shade(form: str) -> str:
    bits = form_bits(form)
    return next((shade for most, shade in _SHADES if bits <= most), "█")


def _quality(data: ReportData) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("quality, held out")
    for heading in ("ppl before", "ppl after", "KL mean", "KL 99 %", "same top token"):
        table.add_column(heading, justify="right")
    for row in facts.quality_table(data):
        table.add_row(
            row["task"], row["before"], row["after"], row["kl_mean"], row["kl_99"], row["same_top"]
        )
    return table


def _problems(data: ReportData) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("problems solved")
    for heading in ("problems", "exact match before", "after", "share kept"):
        table.add_column(heading, justify="right")
    for row in facts.problem_table(data):
        table.add_row(row["task"], row["problems"], row["before"], row["after"], row["recovery"])
    return table
