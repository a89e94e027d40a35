"""The last page of the demo: the full model and the smaller one side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from edge_moe.checkpoint import Checkpoint
from edge_moe.demo.full_bill import full_terms
from edge_moe.files import write_text
from edge_moe.formats import DROP, FORM_NAMES
from edge_moe.measurement import EvalResult, RunMeasurement, load_evals
from edge_moe.metrics import Estimate
from edge_moe.plan import MemoryTerm, Plan
from edge_moe.units import format_bytes

if TYPE_CHECKING:
    from edge_moe.demo.flow import Demo


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Side(_Model):
    """One of the two models. Perplexity off the task is the geometric mean over the other tasks."""

    disk_bytes: int
    forms: dict[str, int]
    """Number of experts in every form."""
    experts_bytes: int
    dense_bytes: int
    planned_bytes: int
    runtime_bytes: int
    """The part of `planned_bytes` that Python and its libraries take, whatever the model."""
    peak_bytes: int
    task_perplexity: Estimate
    other_perplexity: float
    exact_match: Estimate | None
    tokens_per_second: float
    text: str


class Summary(_Model):
    """What the demo found."""

    task: str
    other_tasks: list[str]
    budget_bytes: int
    prompt: str
    full: Side
    small: Side
    task_kld: Estimate
    other_kld: float
    """Mean KLD over the other tasks."""
    recovery_of: str
    recovery_percent: float


def summarise(demo: Demo) -> Summary:
    """Collect what the steps wrote, and keep it as `summary.json`."""
    plan = Plan.load(demo.plan)
    evals = {result.task: result for result in load_evals(demo.package)}
    own = evals.pop(demo.task)
    others = list(evals.values())
    if own.base_perplexity is None or own.comparison is None or own.recovery_percent is None:
        raise ValueError(f"{demo.package} was evaluated without a reference")
    found = Summary(
        task=demo.task,
        other_tasks=sorted(evals),
        budget_bytes=demo.budget_bytes,
        prompt=demo.prompt,
        full=_full_side(demo, plan, own, others),
        small=_small_side(demo, plan, own, others),
        task_kld=own.comparison.mean_kld,
        other_kld=_mean([each.comparison.mean_kld.value for each in others if each.comparison]),
        recovery_of=own.recovery_of or "",
        recovery_percent=own.recovery_percent,
    )
    write_text(demo.folder / "summary.json", found.model_dump_json(indent=1) + "\n")
    return found


def print_summary(summary: Summary, console: Console) -> None:
    """The table and a sample of text of both models."""
    table = Table(title=f"\nThe demo model, shrunken for {summary.task}", title_style="bold")
    table.add_column("")
    table.add_column("full model", justify="right")
    table.add_column("smaller model", justify="right")
    for section in (_size_rows(summary), _memory_rows(summary), _quality_rows(summary)):
        for name, full, small in section:
            table.add_row(name, full, small)
        table.add_section()
    speeds = (f"{side.tokens_per_second:.1f}" for side in (summary.full, summary.small))
    table.add_row("tokens per second", *speeds)
    console.print(table)
    for name, side in (("full model", summary.full), ("smaller model", summary.small)):
        sample = Text.assemble((summary.prompt, "bold"), side.text)
        console.print(Panel(sample, title=name, title_align="left"))


def _size_rows(summary: Summary) -> list[tuple[str, str, str]]:
    full, small = summary.full, summary.small
    return [
        ("size on disk", format_bytes(full.disk_bytes), format_bytes(small.disk_bytes)),
        ("experts kept", _kept(full), _kept(small)),
        ("how they are stored", _forms(full), _forms(small)),
    ]


def _memory_rows(summary: Summary) -> list[tuple[str, str, str]]:
    full, small = summary.full, summary.small
    rows = [
        ("experts in memory", full.experts_bytes, small.experts_bytes),
        ("other weights in memory", full.dense_bytes, small.dense_bytes),
        ("Python, torch, transformers", full.runtime_bytes, small.runtime_bytes),
        ("peak memory, planned", full.planned_bytes, small.planned_bytes),
        ("peak memory, measured", full.peak_bytes, small.peak_bytes),
    ]
    texts = [(name, format_bytes(left), format_bytes(right)) for name, left, right in rows]
    return [*texts, ("memory budget", "none", format_bytes(summary.budget_bytes))]


def _quality_rows(summary: Summary) -> list[tuple[str, str, str]]:
    full, small, task = summary.full, summary.small, summary.task
    rows = [
        (f"perplexity on {task}", f"{full.task_perplexity}", f"{small.task_perplexity}"),
        (f"KL divergence on {task}", "0", f"{summary.task_kld}"),
        (
            "perplexity off the task",
            f"{full.other_perplexity:.2f}",
            f"{small.other_perplexity:.2f}",
        ),
        ("KL divergence off the task", "0", f"{summary.other_kld:.4f}"),
    ]
    if full.exact_match and small.exact_match:
        rows.append(("sums solved", _percent(full.exact_match), _percent(small.exact_match)))
    kept = f"quality kept, by {summary.recovery_of}"
    return [*rows, (kept, "100 %", f"{summary.recovery_percent:.1f} %")]


def _full_side(demo: Demo, plan: Plan, own: EvalResult, others: Sequence[EvalResult]) -> Side:
    if own.base_perplexity is None:
        raise ValueError(f"{demo.package} was evaluated without a reference")
    num_experts = sum(len(row) for row in plan.forms)
    widest = max(plan.form_bytes, key=lambda form: plan.form_bytes[form])
    return Side(
        forms={widest: num_experts},
        task_perplexity=own.base_perplexity,
        other_perplexity=_geometric_mean([x.base_perplexity for x in others if x.base_perplexity]),
        exact_match=own.base_exact_match,
        **_measured(
            demo.model, RunMeasurement.load(demo.full_run), full_terms(Checkpoint(demo.model))
        ),
    )


def _small_side(demo: Demo, plan: Plan, own: EvalResult, others: Sequence[EvalResult]) -> Side:
    every = [form for row in plan.forms for form in row]
    return Side(
        forms={form: every.count(form) for form in FORM_NAMES if form in every},
        task_perplexity=own.perplexity,
        other_perplexity=_geometric_mean([each.perplexity for each in others]),
        exact_match=own.exact_match,
        **_measured(demo.package, RunMeasurement.load(demo.small_run), plan.terms),
    )


def _measured(folder: Path, run: RunMeasurement, terms: Sequence[MemoryTerm]) -> dict[str, Any]:
    planned = {term.name: term.num_bytes for term in terms}
    return {
        "disk_bytes": _weight_file_bytes(folder),
        "experts_bytes": planned["experts"],
        "dense_bytes": planned["dense weights"],
        "runtime_bytes": planned["runtime"],
        "planned_bytes": sum(planned.values()),
        "peak_bytes": run.peak_memory_bytes,
        "tokens_per_second": run.tokens_per_second,
        "text": run.text,
    }


def _weight_file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _kept(side: Side) -> str:
    total = sum(side.forms.values())
    return f"{total - side.forms.get(DROP, 0)} of {total}"


def _forms(side: Side) -> str:
    kept = [(form, count) for form, count in side.forms.items() if form != DROP]
    return ", ".join(f"{count} x {form}" for form, count in kept)


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.0f} ± {100 * estimate.error:.0f} %"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _geometric_mean(estimates: Sequence[Estimate]) -> float:
    return math.exp(_mean([math.log(each.value) for each in estimates]))
