"""Several ways to spend the same bytes on the experts, each built and measured on held-out text.

The plan is compared with its own rivals (prune only, quantise only, one type for all, random
retention). Every contender is really built as a native package and run by the native runtime.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table

from edge_moe import metrics
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.demo import task_names
from edge_moe.demo.full_bill import CONTEXT_TOKENS, budget_for_share, full_forms
from edge_moe.formats import FORM_NAMES, expert_bytes
from edge_moe.gradient_stats import GradientStats
from edge_moe.measurement import Provenance
from edge_moe.metrics import Estimate, TokenScores
from edge_moe.overhead import runtime_overhead
from edge_moe.plan import Plan
from edge_moe.planner import make_plan
from edge_moe.rivals import RANDOM_NAME
from edge_moe.runtime.evaluate import (
    LanguageModel,
    open_model,
    progress,
    score_windows,
)
from edge_moe.runtime.heldout import heldout_windows
from edge_moe.spec import ModelSpec
from edge_moe.stats import ExpertStats
from edge_moe.units import format_bytes

WINDOW_TOKENS = 256
PLAN_NAME = "edge-moe plan"
RANDOM_DRAWS = 3


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Contender(_Model):
    """One way to spend the bytes, and what it costs in quality."""

    name: str
    expert_bytes: int
    forms: dict[str, int]
    """Number of experts in every form that is used."""
    predicted_loss: float | None
    """In the plan's unit; None for random draws."""
    in_task_kld: Estimate
    """Mean KLD against the full model on held-out text of the task."""
    in_task_ppl: Estimate
    out_of_task_kld: Estimate
    """The same on held-out text of all other shipped tasks."""


class EqualBytes(_Model):
    """All contenders at one share of the experts' 16-bit bytes."""

    provenance: Provenance
    model: str
    task: str
    share: float
    full_expert_bytes: int
    """All experts at 16 bits."""
    window_tokens: int
    max_windows: int | None
    """Held-out windows per task at most."""
    in_task_base_ppl: Estimate
    contenders: list[Contender]
    """The plan comes first."""

    @property
    def best_rival(self) -> Contender:
        return min(self.contenders[1:], key=lambda each: each.in_task_kld.value)


@dataclass(frozen=True)
class _Candidate:
    name: str
    forms: list[list[str]]
    loss: float | None


def plan_for_share(
    checkpoint: Checkpoint,
    stats: ExpertStats,
    share: float,
    gradients: GradientStats | None = None,
) -> Plan:
    """The plain program's plan at `share` of the experts' 16-bit bytes, without the search."""
    return make_plan(
        checkpoint,
        stats,
        budget_for_share(checkpoint, share),
        model=str(checkpoint.folder),
        context_tokens=CONTEXT_TOKENS,
        runtime=runtime_overhead(checkpoint.spec.model_type, "cpu"),
        gradients=gradients,
    )


def equal_bytes(
    model: Path,
    stats: ExpertStats,
    task: str,
    share: float,
    *,
    gradients: GradientStats | None = None,
    max_windows: int | None = 24,
) -> EqualBytes:
    """Build and measure the plan and its rivals at `share` of the experts' 16-bit bytes.

    The plan is the plain program's: what a search would add is not in it.

    Disk and memory: the full model and every package at once, so that the reference's logits are
    computed only once per window. Meant for models of the demo's size.
    """
    checkpoint = Checkpoint(model)
    spec = checkpoint.spec
    plan = plan_for_share(checkpoint, stats, share, gradients)
    candidates = _candidates(plan)
    with _opened(model, plan, candidates) as (base, packages):
        windows = {
            name: heldout_windows(name, base.tokenizer, WINDOW_TOKENS, max_windows)
            for name in {task, *task_names()}
        }
        own = _score(f"{task}, {share:.0%}", packages, base, windows.pop(task))
        others = _score("other tasks", packages, base, sum(windows.values(), []))
    return EqualBytes(
        provenance=Provenance.published(),
        model=model.name,
        task=task,
        share=share,
        full_expert_bytes=_total_bytes(spec, full_forms(spec)),
        window_tokens=WINDOW_TOKENS,
        max_windows=max_windows,
        in_task_base_ppl=metrics.perplexity(own[PLAN_NAME].base_nll),
        contenders=[
            _contender(spec, each, own[each.name], others[each.name]) for each in candidates
        ],
    )


def print_equal_bytes(results: Sequence[EqualBytes], console: Console) -> None:
    """One table, in Markdown, so that it can be pasted into a README."""
    table = Table(box=box.MARKDOWN)
    for heading in ("task", "experts' bytes", "how they are spent", "forms"):
        table.add_column(heading)
    for heading in ("KLD in task", "PPL in task", "KLD off task"):
        table.add_column(heading, justify="right")
    for result in results:
        for index, each in enumerate(result.contenders):
            size = f"{result.share:.1%} of {format_bytes(result.full_expert_bytes)}"
            table.add_row(
                "" if index else result.task,
                "" if index else size,
                each.name,
                ", ".join(f"{count} {form}" for form, count in each.forms.items()),
                f"{each.in_task_kld}",
                f"{each.in_task_ppl}",
                f"{each.out_of_task_kld}",
            )
        base = f"{result.in_task_base_ppl}"
        table.add_row("", "", "full model", "all 16-bit", "0", base, "0")
    console.print(table)


@contextmanager
def _opened(
    model: Path, plan: Plan, candidates: Sequence[_Candidate]
) -> Iterator[tuple[LanguageModel, dict[str, LanguageModel]]]:
    """The full model and one built and opened package per candidate, all gone afterwards."""
    with TemporaryDirectory(prefix="edge-moe-") as work, ExitStack() as stack:

        def opened(path: Path) -> LanguageModel:
            found = open_model(path, context_tokens=WINDOW_TOKENS, kernels="exact")
            stack.callback(found.close)
            return found

        packages = {}
        for index, candidate in enumerate(candidates):
            folder = Path(work) / str(index)
            build(plan.with_forms(candidate.forms), folder, model=model)
            packages[candidate.name] = opened(folder)
        yield opened(model), packages


def _score(
    description: str,
    packages: Mapping[str, LanguageModel],
    base: LanguageModel,
    windows: Sequence[Sequence[int]],
) -> dict[str, TokenScores]:
    with progress(description, len(windows)) as advance:
        return score_windows(packages, base, windows, advance)


def _candidates(plan: Plan) -> list[_Candidate]:
    """The plan and its rivals; the random one is drawn several times."""
    found = [_Candidate(PLAN_NAME, plan.forms, plan.loss)]
    for rival in plan.rivals:
        if rival.name != RANDOM_NAME:
            found.append(_Candidate(rival.name, rival.forms, rival.loss))
            continue
        for seed in range(RANDOM_DRAWS):
            forms = _redrawn(rival.forms, plan, seed)
            found.append(_Candidate(f"{rival.name}, draw {seed + 1}", forms, None))
    return found


def _redrawn(forms: list[list[str]], plan: Plan, seed: int) -> list[list[str]]:
    """As many experts of every form per layer, at random places; protected ones stay."""
    draw = random.Random(seed)
    protected = set(plan.super_experts)
    found = []
    for layer_id, row in zip(plan.moe_layer_ids, forms, strict=True):
        free = [expert for expert in range(len(row)) if (layer_id, expert) not in protected]
        shuffled = draw.sample(free, len(free))
        new_row = list(row)
        for old, new in zip(free, shuffled, strict=True):
            new_row[new] = row[old]
        found.append(new_row)
    return found


def _contender(
    spec: ModelSpec, candidate: _Candidate, own: TokenScores, other: TokenScores
) -> Contender:
    every = [form for row in candidate.forms for form in row]
    return Contender(
        name=candidate.name,
        expert_bytes=_total_bytes(spec, candidate.forms),
        forms={form: every.count(form) for form in FORM_NAMES if form in every},
        predicted_loss=candidate.loss,
        in_task_kld=metrics.mean_and_error(own.kld),
        in_task_ppl=metrics.perplexity(own.nll),
        out_of_task_kld=metrics.mean_and_error(other.kld),
    )


def _total_bytes(spec: ModelSpec, forms: Sequence[Sequence[str]]) -> int:
    return sum(expert_bytes(form, *spec.expert_shape) for row in forms for form in row)
