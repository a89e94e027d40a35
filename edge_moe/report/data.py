"""What the report knows: the plan, what was measured, and rows derived from both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from edge_moe.errors import InputError
from edge_moe.formats import DROP, in_order
from edge_moe.measurement import EvalResult, RunMeasurement, load_evals, load_runs
from edge_moe.package import PLAN_NAME, Package, is_package
from edge_moe.plan import MemoryTerm, Plan, Target
from edge_moe.reproduce import build_commands, command_line, replay
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
    how: str = ""
    """How it was measured."""
    used_share: float = 1.0
    """Share of what was planned for that the run made use of."""

    @property
    def error(self) -> float | None:
        """(measured - planned) / planned for what was used; None without either."""
        planned_bytes = self.planned_bytes * self.used_share
        if self.measured_bytes is None or not planned_bytes:
            return None
        return (self.measured_bytes - planned_bytes) / planned_bytes


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
            for form in in_order(every)
        ]

    @cached_property
    def full_expert_bytes(self) -> int:
        """Bytes of all experts at 16 bits, or as the source stores them, none dropped."""
        pairs = zip(self.plan.forms, self._whole_bytes, strict=True)
        return sum(len(row) * one_expert for row, one_expert in pairs)

    @cached_property
    def _whole_bytes(self) -> list[int]:
        """[L] bytes of one expert at 16 bits, or as the source stores it."""
        plan, sizes = self.plan, self.plan.form_bytes
        if plan.stored_forms:
            return [sizes[form] for form in plan.stored_forms]
        return [max(sizes.values(), default=0)] * len(plan.forms)

    def waterfall(self) -> list[Step]:
        """From all experts whole (16 bits, or as a GGUF source has them) to what is stored."""
        plan, full = self.plan, self.full_expert_bytes
        experts = plan.term("experts").num_bytes
        pairs = zip(plan.forms, self._whole_bytes, strict=True)
        dropped = sum(row.count(DROP) * one_expert for row, one_expert in pairs)
        return [
            Step("in the source" if plan.stored_forms else "at 16 bits", full, "absolute"),
            Step("dropped", -dropped, "relative"),
            Step("fewer bits", experts - (full - dropped), "relative"),
            Step("as stored", experts, "total"),
        ]

    @property
    def terms(self) -> list[MemoryTerm]:
        """The bill: the recorded run's, at its own budget, or else the plan's."""
        return self.run.terms if self.run else self.plan.terms

    def term_rows(self) -> list[TermRow]:
        """Planned beside measured, the total last."""
        if self.run is None:
            rows = [TermRow(term.name, term.num_bytes, None, term.source) for term in self.terms]
        else:
            rows = [_measured_row(self.run, term) for term in self.terms]
        total = sum(term.num_bytes for term in self.terms)
        how = "peak of the process" if self.run else ""
        return [*rows, TermRow("total", total, self.peak_memory_bytes, "", is_total=True, how=how)]

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

    @property
    def target(self) -> Target:
        """What the folder holds; the plan may have been made for something else."""
        if is_package(self.folder):
            return "native"
        if any(self.folder.glob("*.gguf")):
            return "gguf"
        return "hf" if any(self.folder.glob("*.safetensors")) else self.plan.target

    @property
    def artefact(self) -> Path:
        """What `run` and `eval` are given."""
        files = sorted(self.folder.glob("*.gguf"))
        return files[0] if self.target == "gguf" and files else self.folder

    def commands(self) -> list[str]:
        """The commands that lead from the model to this report."""
        lines = build_commands(self.plan, self.folder, self.target)
        for record in (self.run, *self.evals):
            if record is not None:
                lines.append(replay(record.provenance, model=record.model, folder=self.artefact))
        lines.append(command_line("report", self.folder, "-o", "report.html"))
        return list(dict.fromkeys(lines))


_HOW = {
    "dense weights": "tensors held",
    "experts": "slots held",
    "shadows": "buffers held",
    "runtime": "a process with next to no model",
}


def _measured_row(run: RunMeasurement, term: MemoryTerm) -> TermRow:
    """One term beside what the run took. The workspace is what no other term explains."""
    known, how, share = run.measured_terms.get(term.name), _HOW.get(term.name, ""), 1.0
    if term.name == "KV cache" and run.cached_tokens:
        share = run.cached_tokens / run.context_tokens
        how = f"tensors held by {run.cached_tokens:,} of {run.context_tokens:,} tokens"
        if share < 1:
            how += ", compared with their share"
    others = [each.name for each in run.terms if each.name != "workspace"]
    if term.name == "workspace" and all(name in run.measured_terms for name in others):
        rest = run.peak_memory_bytes - sum(run.measured_terms[name] for name in others)
        known = rest if rest > 0 else None
        how = "derived: peak less the rest" if known else "less than the runtime's own spread"
    elif known is None:
        how = ""
    return TermRow(term.name, term.num_bytes, known, term.source, how=how, used_share=share)


def load_report(folder: Path) -> ReportData:
    """Read the plan and the measurements of the artefact in `folder`.

    Raises:
        InputError: the folder does not exist or holds no plan.json.
        PackageError: a native package that is damaged or incomplete, by its manifest and sizes.
        PlanError: the plan is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the folder that `edge-moe build` wrote")
    if not (folder / PLAN_NAME).exists():
        raise InputError(
            f"{folder} holds no {PLAN_NAME}: give the folder that `edge-moe build` wrote"
        )
    if is_package(folder) or any(folder.glob("experts-*.safetensors")):
        Package(folder)  # one that lost something no longer is what the plan says
    runs = load_runs(folder)
    config = folder / "config.json"
    return ReportData(
        folder=folder,
        plan=Plan.load(folder / PLAN_NAME),
        spec=ModelSpec.from_file(config) if config.exists() else None,
        run=runs[-1] if runs else None,
        evals=load_evals(folder),
    )
