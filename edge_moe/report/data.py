"""What the report knows: the plan, what was measured, and rows derived from both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from edge_moe.errors import InputError
from edge_moe.formats import DROP, FORM_NAMES
from edge_moe.measurement import EvalResult, RunMeasurement, load_evals, load_runs
from edge_moe.package import PLAN_NAME
from edge_moe.plan import Plan
from edge_moe.spec import ModelSpec


@dataclass(frozen=True)
class Step:
    """One bar of the memory waterfall."""

    label: str
    num_bytes: int
    """Signed for relative steps."""
    kind: Literal["absolute", "relative", "total"]


@dataclass(frozen=True)
class TermRow:
    """One term of the bill: planned beside measured."""

    name: str
    planned_bytes: int
    measured_bytes: int | None
    source: str
    is_total: bool = False

    @property
    def error(self) -> float | None:
        """(measured - planned) / planned, or None where nothing was measured or planned."""
        if self.measured_bytes is None or not self.planned_bytes:
            return None
        return (self.measured_bytes - self.planned_bytes) / self.planned_bytes


@dataclass(frozen=True)
class FormRow:
    """How many experts took one form."""

    form: str
    count: int
    num_bytes: int


@dataclass(frozen=True)
class ReportData:
    """Everything the pages show. `run` is the newest recorded run of this artefact."""

    folder: Path
    plan: Plan
    spec: ModelSpec | None
    """None when the folder holds no config.json (a GGUF target)."""
    run: RunMeasurement | None
    evals: list[EvalResult]

    @property
    def peak_memory_bytes(self) -> int | None:
        return self.run.peak_memory_bytes if self.run else None

    @property
    def budget_bytes(self) -> int:
        """The budget of the recorded run, or else the one planned for."""
        if self.run and self.run.budget_bytes:
            return self.run.budget_bytes
        return self.plan.budget_bytes

    @cached_property
    def form_rows(self) -> list[FormRow]:
        """Forms in use, from fewest to most bits."""
        every = [form for row in self.plan.forms for form in row]
        sizes = self.plan.form_bytes
        return [
            FormRow(form, every.count(form), every.count(form) * sizes.get(form, 0))
            for form in FORM_NAMES
            if form in every
        ]

    @cached_property
    def full_expert_bytes(self) -> int:
        """Bytes of all experts at 16 bits, none dropped."""
        num_experts = sum(len(row) for row in self.plan.forms)
        return num_experts * max(self.plan.form_bytes.values(), default=0)

    def waterfall(self) -> list[Step]:
        """From all experts at 16 bits, over what was saved, to the whole bill."""
        plan, full = self.plan, self.full_expert_bytes
        experts = plan.term("experts").num_bytes
        one_expert = max(plan.form_bytes.values(), default=0)
        dropped = sum(row.count for row in self.form_rows if row.form == DROP) * one_expert
        steps = [
            Step("experts at 16 bits", full, "absolute"),
            Step("dropped", -dropped, "relative"),
            Step("fewer bits", experts - (full - dropped), "relative"),
            Step("experts kept", experts, "total"),
        ]
        steps += [
            Step(term.name, term.num_bytes, "relative")
            for term in plan.terms
            if term.name != "experts"
        ]
        return [*steps, Step("total", plan.total_bytes, "total")]

    def term_rows(self) -> list[TermRow]:
        """Planned beside measured, the total last; terms of the recorded run where there is one."""
        terms = self.run.terms if self.run else self.plan.terms
        measured = self.run.measured_terms if self.run else {}
        rows = [
            TermRow(term.name, term.num_bytes, measured.get(term.name), term.source)
            for term in terms
        ]
        total = sum(term.num_bytes for term in terms)
        return [*rows, TermRow("total", total, self.peak_memory_bytes, "", is_total=True)]

    def context_rows(self) -> list[tuple[int, int, int]]:
        """(context tokens, KV cache bytes, total bytes) at a few context lengths."""
        planned = self.plan.term("KV cache").num_bytes
        per_token = planned / self.plan.context_tokens
        longest = self.spec.max_position_embeddings if self.spec else self.plan.context_tokens
        lengths = {self.plan.context_tokens, longest}
        lengths |= {length for length in (512, 2048, 8192, 32768, 131072) if length <= longest}
        return [
            (
                tokens,
                round(per_token * tokens),
                self.plan.total_bytes - planned + round(per_token * tokens),
            )
            for tokens in sorted(lengths)
        ]

    def commands(self) -> list[str]:
        """The commands that lead from the model to this report."""
        plan = self.plan
        tasks = " ".join(f"--task {task}" for task in plan.tasks)
        lines = [
            f"edge-moe calibrate {plan.model} {tasks} -o stats",
            f"edge-moe plan {plan.model} --stats stats --budget {plan.budget_bytes}B "
            f"--ctx {plan.context_tokens} --target {plan.target} --device {plan.device} "
            "-o plan.json",
            f"edge-moe build plan.json -o {self.folder.name}",
        ]
        if self.run:
            lines.append(self.run.provenance.command)
        lines += dict.fromkeys(result.provenance.command for result in self.evals)
        return [*lines, f"edge-moe report {self.folder.name} -o report.html"]


def load_report(folder: Path) -> ReportData:
    """Read the plan and the measurements of the artefact in `folder`.

    Raises:
        InputError: the folder does not exist or holds no plan.json.
        PlanError: the plan is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the folder that `edge-moe build` wrote")
    if not (folder / PLAN_NAME).exists():
        raise InputError(
            f"{folder} holds no {PLAN_NAME}: give the folder that `edge-moe build` wrote"
        )
    runs = load_runs(folder)
    config = folder / "config.json"
    return ReportData(
        folder=folder,
        plan=Plan.load(folder / PLAN_NAME),
        spec=ModelSpec.from_file(config) if config.exists() else None,
        run=runs[-1] if runs else None,
        evals=load_evals(folder),
    )
