"""The facts of a report as short strings, shared by the HTML page and the terminal."""

from __future__ import annotations

from typing import Any

from edge_moe.eval_table import percent
from edge_moe.formats import DROP
from edge_moe.measurement import EvalResult
from edge_moe.metrics import Estimate
from edge_moe.report.data import ReportData
from edge_moe.reproduce import command_line, model_name, prompt_options
from edge_moe.tasks import task_label
from edge_moe.trials import SELECTION_RULE
from edge_moe.units import format_bytes

NOT_MEASURED = "-"


def title(data: ReportData) -> str:
    """What this report is about."""
    plan = data.plan
    return (
        f"{model_name(plan.model)} for {', '.join(plan.tasks)}, target {data.target} on "
        f"{plan.device}, "
        f"budget {format_bytes(data.budget_bytes)}"
    )


def verdict(data: ReportData) -> list[dict[str, str]]:
    """One or two sentences: does it fit, and what does it cost in quality."""
    budget, peak = data.budget_bytes, data.peak_memory_bytes
    planned = next(row.planned_bytes for row in _terms(data) if row.is_total)
    used = planned if peak is None else peak
    how = "measured" if peak is not None else "planned"
    fits = used <= budget
    parts = [
        {
            "tone": "good" if fits else "bad",
            "text": f"{'Fits' if fits else 'Does not fit'}: "
            f"{format_bytes(used)} {how} of {format_bytes(budget)}.",
        }
    ]
    own = next((result for result in data.evals if result.in_task and result.comparison), None)
    if own is not None and own.comparison is not None:
        parts.append(
            {
                "tone": "",
                "text": f"KL divergence {own.comparison.mean_kld.value:.3g} nats on "
                f"{task_label(own.task)}.",
            }
        )
    return parts


def headline(data: ReportData) -> list[dict[str, str]]:
    """Numbers for the top of the page."""
    every = [form for row in data.plan.forms for form in row]
    experts = data.plan.term("experts").num_bytes
    full = data.full_expert_bytes
    items = [("experts kept", f"{len(every) - every.count(DROP)} of {len(every)}")]
    if full:
        stored = "source's expert" if data.plan.stored_forms else "experts' 16-bit"
        items.append((f"of the {stored} bytes", f"{experts / full:.0%}"))
    items.append(("planned memory", format_bytes(data.plan.total_bytes)))
    if data.run is not None:
        items.append(("measured peak", format_bytes(data.run.peak_memory_bytes)))
        items.append(("tokens per second, decoding", f"{data.run.tokens_per_second:.1f}"))
    return [{"label": label, "value": value} for label, value in items]


def term_table(data: ReportData) -> list[dict[str, Any]]:
    """Planned beside measured, term by term."""
    return [
        {
            "name": row.name,
            "planned": format_bytes(row.planned_bytes),
            "measured": NOT_MEASURED
            if row.measured_bytes is None
            else format_bytes(row.measured_bytes),
            "error": NOT_MEASURED if row.error is None else f"{row.error:+.1%}",
            "source": row.source,
            "how": row.how,
            "is_total": row.is_total,
        }
        for row in _terms(data)
    ]


def quality_table(data: ReportData) -> list[dict[str, str]]:
    """Held-out quality per task; the plan's own tasks first."""
    return [_quality_row(result) for result in data.evals]


def problem_table(data: ReportData) -> list[dict[str, str]]:
    """Problems solved exactly, for the tasks that have problems."""
    return [
        {
            "task": _task(result),
            "problems": f"{result.num_problems}",
            "before": _share(result.base_exact_match),
            "after": _share(result.exact_match),
            "recovery": f"{result.recovery} %"
            if result.recovery is not None and result.recovery_of == "exact match"
            else NOT_MEASURED,
        }
        for result in data.evals
        if result.exact_match is not None
    ]


def search_table(data: ReportData) -> list[dict[str, str]]:
    """Every plan that was measured, the best first."""
    search = data.plan.search
    if search is None:
        return []
    best = min((trial.kld for trial in search.trials), default=0.0)
    return [
        {
            "name": trial.name,
            "kld": f"{trial.kld:.3g}",
            "ratio": f"{trial.kld / best:.2f}" if best > 0 else NOT_MEASURED,
            "mark": "this plan" if trial.name == search.chosen else "",
        }
        for trial in sorted(search.trials, key=lambda trial: trial.kld)
    ]


def search_line(data: ReportData) -> str:
    """What was tried, on what, and for how long."""
    search = data.plan.search
    if search is None:
        return "No plan was measured before choosing; the predicted loss alone decided."
    ending = f"; {search.early_end}" if search.early_end else ""
    count = len(search.trials)
    return (
        f"{count} plan{'s' * (count != 1)} measured in {search.seconds:.0f} s on "
        f"{search.text or 'held-out text'}; {SELECTION_RULE}{ending}."
    )


def speed_table(data: ReportData) -> list[dict[str, str]]:
    """What the recorded run did, in the order that people ask."""
    run = data.run
    if run is None:
        return []
    rows = [
        ("decoding", f"{run.tokens_per_second:.1f} tokens per second"),
        ("generated", f"{run.generated_tokens} tokens in {run.decode_seconds:.2f} s"),
        ("prompt", f"{run.prompt_tokens} tokens in {run.prefill_seconds:.2f} s"),
        ("loading", f"{run.load_seconds:.2f} s"),
    ]
    paging = run.paging if run.paging.get("misses") else {}  # else nothing was ever paged
    for name, value in paging.items():
        words = name.replace("_", " ")
        if name.endswith("_bytes"):
            rows.append((words.removesuffix(" bytes"), format_bytes(value)))
        elif name.endswith("_seconds"):
            rows.append((words.removesuffix(" seconds"), f"{value:.3f} s"))
        else:
            rows.append((words, f"{value:,.4g}" if value % 1 else f"{value:,.0f}"))
    return [{"name": name, "value": value} for name, value in rows]


def context_table(data: ReportData) -> list[dict[str, str]]:
    """What a longer context would take."""
    return [
        {
            "context": f"{tokens:,} tokens",
            "kv": format_bytes(kv_bytes),
            "total": format_bytes(total_bytes),
            "fits": "yes" if total_bytes <= data.plan.budget_bytes else "no",
        }
        for tokens, kv_bytes, total_bytes in data.context_rows()
    ]


def record_command(data: ReportData) -> str:
    """The command that measures memory and speed; empty for GGUF, which `run` does not load."""
    if data.target == "gguf":
        return ""
    limits = "--budget", f"{data.plan.budget_bytes}B", "--ctx", str(data.plan.context_tokens)
    return command_line("run", data.artefact, *limits, *prompt_options(data.plan), "--record")


def eval_command(data: ReportData) -> str:
    """The command that measures quality."""
    plan = data.plan
    known = plan.calibration.tasks if plan.calibration else plan.tasks
    tasks = [word for task in known for word in ("--task", task)]
    return command_line("eval", data.artefact, "--against", plan.model, *tasks, "--record")


def provenance(data: ReportData) -> str:
    """Which machine and versions the numbers come from."""
    records = [record for record in (data.run, *data.evals) if record is not None]
    if not records:
        return f"Planned by edge-moe {data.plan.edge_moe_version}; nothing was measured yet."
    source = records[0].provenance
    machine = source.machine
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    return (
        f"Measured {source.time:%Y-%m-%d %H:%M} UTC by edge-moe {source.edge_moe_version} on "
        f"{machine.cpu}, {machine.cores} cores, {format_bytes(machine.ram_bytes)} RAM"
        f"{', ' + machine.accelerator if machine.accelerator else ''}; {machine.os}, "
        f"Python {machine.python}, {packages}. "
        f"Model {data.plan.model_fingerprint[:12]}, statistics {data.plan.stats_fingerprint[:12]}."
    )


def _terms(data: ReportData) -> list[Any]:
    return data.term_rows()


def _with_error(estimate: Estimate | None, spec: str, scale: float = 1.0) -> str:
    if estimate is None:
        return NOT_MEASURED
    return f"{estimate.value * scale:{spec}} ± {estimate.error * scale:.1g}"


def _share(estimate: Estimate | None) -> str:
    return NOT_MEASURED if estimate is None else percent(estimate)


def _task(result: EvalResult) -> str:
    remark = {True: " (in task)", False: " (off task)", None: ""}[result.in_task]
    return task_label(result.task) + remark


def _quality_row(result: EvalResult) -> dict[str, str]:
    comparison = result.comparison
    return {
        "task": _task(result),
        "before": _with_error(result.base_perplexity, ".4g"),
        "after": _with_error(result.perplexity, ".4g"),
        "kl_mean": _with_error(comparison.mean_kld, ".3g") if comparison else NOT_MEASURED,
        "kl_median": f"{comparison.median_kld:.3g}" if comparison else NOT_MEASURED,
        "kl_99": f"{comparison.kld_99:.3g}" if comparison else NOT_MEASURED,
        "same_top": f"{comparison.same_top_p.value:.1%}" if comparison else NOT_MEASURED,
    }
