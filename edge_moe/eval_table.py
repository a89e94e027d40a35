"""Evaluation results as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from edge_moe.measurement import EvalResult, SkippingCost, StallCost
from edge_moe.metrics import Estimate
from edge_moe.tasks import task_label
from edge_moe.units import format_bytes

_MAX_COLUMNS = 3
_TEXT_ROWS = (
    "Mean PPL(Q)",
    "Mean PPL(base)",
    "Mean KLD",
    "99.0% KLD",
    "Same top p",
    "recovery (1 / perplexity)",
    "active experts",
    "active parameters",
    "expert bytes saved",
    "router weight of those",
)
_PROBLEM_ROWS = ("exact match (Q)", "exact match (base)", "recovery (exact match)")
_SHORT = {
    "Mean PPL(Q)": "PPL(Q)",
    "Mean PPL(base)": "PPL(base)",
    "router weight of those": "from shadows",
}
_SHORT |= dict.fromkeys(("recovery (1 / perplexity)", "recovery (exact match)"), "recovery")
_WHERE = {True: "in task", False: "off task", None: ""}


def print_eval(results: Sequence[EvalResult], console: Console) -> None:
    """Names are those of llama-perplexity; many tasks are shown as rows, with fewer figures."""
    if len(results) > _MAX_COLUMNS:
        _print_compact(results, console)
    else:
        _print_columns(results, console)
    for result in results:
        if result.num_search_windows:
            console.print(
                f"{result.task}: {result.num_search_windows} held-out windows left out, "
                "the plan was chosen by them",
                markup=False,
            )


def _print_columns(results: Sequence[EvalResult], console: Console) -> None:
    table = Table(title=_title(results[0]) if results else None, title_justify="left")
    table.add_column("")
    for result in results:
        where = _WHERE[result.in_task]
        table.add_column(f"{result.task}\n{where}" if where else result.task, justify="right")
    cells = [dict(_rows(result)) for result in results]
    for name in dict.fromkeys(name for column in cells for name in column):
        table.add_row(name, *(column.get(name, "") for column in cells))
    console.print(table)


def _print_compact(results: Sequence[EvalResult], console: Console) -> None:
    """Two tables that fit 110 columns: held-out text, and problems where a task has them."""
    text = "recovery: 1 / perplexity, as a share of the reference's"
    _print_rows(results, _TEXT_ROWS, _title(results[0]), text, console)
    solved = [result for result in results if result.exact_match is not None]
    text = "recovery: exact match, as a share of the reference's"
    if solved:
        _print_rows(solved, _PROBLEM_ROWS, "Problems solved", text, console)


def _print_rows(
    results: Sequence[EvalResult], names: Sequence[str], title: str, note: str, console: Console
) -> None:
    """Tasks down, those of `names` that any result has across."""
    cells = [dict(_rows(result)) for result in results]
    shown = [name for name in names if any(name in row for row in cells)]
    table = Table(
        title=title, title_justify="left", box=None, pad_edge=False, collapse_padding=True
    )
    table.add_column("task", no_wrap=True)
    for name in shown:
        table.add_column(_SHORT.get(name, name), justify="right", no_wrap=True)
    for result, row in zip(results, cells, strict=True):
        where = f" ({_WHERE[result.in_task]})" if _WHERE[result.in_task] else ""
        label = task_label(result.task) + where
        table.add_row(label, *(row.get(name, "") for name in shown))
    console.print(table)
    if any(_SHORT.get(name) == "recovery" for name in shown):
        console.print(note, markup=False)


def _title(result: EvalResult) -> str:
    return f"{result.model} against {result.against}" if result.against else result.model


def _rows(result: EvalResult) -> list[tuple[str, str]]:
    rows = [("tokens scored", f"{result.num_tokens:,}"), ("Mean PPL(Q)", f"{result.perplexity}")]
    if result.base_perplexity is not None:
        rows.append(("Mean PPL(base)", f"{result.base_perplexity}"))
    rows += _comparison_rows(result)
    if result.exact_match is not None:
        rows.append(("exact match (Q)", percent(result.exact_match)))
    if result.base_exact_match is not None:
        rows.append(("exact match (base)", percent(result.base_exact_match)))
    if result.recovery is not None:
        rows.append((f"recovery ({result.recovery_of})", f"{result.recovery} %"))
    if result.skipping is not None:
        rows += [("skipping rule", result.skipping.rule), *skipping_rows(result.skipping)]
    if result.pre_gate:
        rows.append(("pre-gate", result.pre_gate))
    if result.stall is not None:
        rows += _stall_rows(result.stall)
    return rows


def _stall_rows(found: StallCost) -> list[tuple[str, str]]:
    """How misses were met, and what that read."""
    seconds = found.allowed_seconds
    return [
        ("stall", found.mode if seconds is None else f"{found.mode}, {seconds:g} s per token"),
        ("experts resident", f"{found.hit_rate:.1%}"),
        ("computed from shadows", f"{found.shadow_experts_per_token:.2f} experts per token"),
        ("router weight of those", f"{found.shadow_share:.1%}"),
        ("experts read", f"{format_bytes(found.page_in_bytes_per_token)} per token"),
    ]


def _comparison_rows(result: EvalResult) -> list[tuple[str, str]]:
    found = result.comparison
    if found is None:
        return []
    return [
        ("Mean ln(PPL(Q)/PPL(base))", f"{found.ln_ppl_ratio}"),
        ("Mean PPL(Q)/PPL(base)", f"{found.ppl_ratio}"),
        ("Mean KLD", f"{found.mean_kld}"),
        ("Maximum KLD", f"{found.max_kld:.3g}"),
        ("99.0% KLD", f"{found.kld_99:.3g}"),
        ("95.0% KLD", f"{found.kld_95:.3g}"),
        ("90.0% KLD", f"{found.kld_90:.3g}"),
        ("Median KLD", f"{found.median_kld:.3g}"),
        ("RMS Δp", percent(found.rms_delta_p)),
        ("Same top p", percent(found.same_top_p)),
    ]


def skipping_rows(found: SkippingCost) -> list[tuple[str, str]]:
    """Per token: what the skipping rule left, and what it saved."""
    return [
        ("active experts", f"{found.active_per_token:.2f} of {found.routed_per_token:g}"),
        ("active parameters", f"{found.active_parameters / 1e6:,.2f} M"),
        ("routed expert bytes", f"{format_bytes(found.routed_bytes_per_token)} per token"),
        (
            "expert bytes saved",
            f"{format_bytes(found.saved_bytes_per_token)} per token ({found.saved_share:.1%})",
        ),
    ]


def percent(estimate: Estimate) -> str:
    """A share with its error bar: 0.95 -> `95.0 ± 1.2 %`."""
    return f"{Estimate(100 * estimate.value, 100 * estimate.error)} %"
