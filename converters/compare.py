"""`compare`: every method on one model, at the same expert bytes, on the same held-out text.

Nothing is built that can be scored in memory: methods that need a form per expert run through
`VariantScorer`, a dozen plans per pass over the layers, all packed by one quantiser. Methods that
write other weights (`edge_moe.converters.transforms`) run once per size and form, and their
checkpoints are scored against the same reference. Each finished cell is a file: a killed run
goes on with the next one. Work files are kept in OUTPUT/.compare until all cells are done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import edge_moe
from edge_moe import metrics
from edge_moe.candidates import candidate_forms, full_expert_bytes, least_expert_bytes
from edge_moe.checkpoint import Checkpoint
from edge_moe.compare.contenders import (
    SOLVE_SECONDS,
    Contender,
    Field,
    Kind,
    contenders,
    loss_variants,
)
from edge_moe.compare.record import (
    Cell,
    CompareOptions,
    Score,
    TextScore,
    cell_name,
    load_cell,
)
from edge_moe.converters.calibrate import text_packer
from edge_moe.converters.compare_bench import Bench, calibration_settings, compared_windows
from edge_moe.converters.compare_transforms import (
    WantedTransform,
    transformed,
    wanted_transforms,
)
from edge_moe.converters.plan_measure import PlanMeasure
from edge_moe.converters.progress import progress_bar
from edge_moe.converters.staging import locked
from edge_moe.converters.variants import PackedExperts, VariantScorer
from edge_moe.errors import InputError
from edge_moe.formats import DROP, FORM_NAMES
from edge_moe.measurement import Provenance
from edge_moe.metrics import TokenScores
from edge_moe.optimise import solve
from edge_moe.plan import SearchRecord, Target
from edge_moe.planner import by_name, gather_evidence, gemq_cost
from edge_moe.problem import Problem, smallest_bytes
from edge_moe.rivals import name_forms
from edge_moe.runtime.heldout import search_windows
from edge_moe.runtime.tokenizer import load_tokenizer
from edge_moe.search import PLAN_NAME, Evidence, search
from edge_moe.spec import ModelSpec
from edge_moe.tasks import windows_fingerprint
from edge_moe.trials import MAX_PASS_PROPOSALS
from edge_moe.units import format_bytes

WORK_NAME = ".compare"


def compare(
    model: Path,
    task: str,
    shares: Sequence[float],
    output: Path,
    options: CompareOptions,
    name: str | None = None,
) -> list[Cell]:
    """Measure every method on `task` at every share of the experts' 16-bit bytes.

    Cells that lie in `output` already, measured with the same settings by the same program, are not
    measured again. `name` is how the cells call the model.
    Memory: as `VariantScorer`. Disk: one transformed checkpoint at a time.

    Raises:
        EdgeMoeError: bad model, text or share, or not enough memory or disk.
    """
    checkpoint = Checkpoint(model)
    _require_room(checkpoint.spec, min(shares), options.target)
    work = output / WORK_NAME
    work.mkdir(parents=True, exist_ok=True)
    with locked(work / "lock", f"another comparison writes to {output}: wait for it, or use two"):
        cells = _Cells(checkpoint, task, work, options, name or checkpoint.folder.name)
        return [cells.cell(share) for share in sorted(set(shares), reverse=True)]


def clear_work(output: Path) -> None:
    """Remove the work files in `output`, unless another comparison is at work there."""
    work = output / WORK_NAME
    with suppress(InputError, FileNotFoundError), locked(work / "lock", "in use"):
        shutil.rmtree(work)


@dataclass(eq=False)
class _Cells:
    """One task on one model: what all cells share is made when the first one needs it."""

    checkpoint: Checkpoint
    task: str
    work: Path
    options: CompareOptions
    name: str
    """What the cells call the model."""

    def cell(self, share: float) -> Cell:
        """Read the cell from disk or measure it."""
        described = json.dumps(self._described | {"share": share}, sort_keys=True)
        settings = hashlib.sha256(described.encode()).hexdigest()
        output = self.work.parent
        path = output / cell_name(self.task, self.options.target, share)
        if path.exists():
            found = load_cell(path)
            if found.settings == settings:
                return found
        cell = _measure(self._bench, share, settings, self.work, self.name)
        cell.save(output)
        _announce(cell)
        return cell

    @cached_property
    def _bench(self) -> Bench:
        own, others = self._windows
        return Bench.of(self.checkpoint, self.task, self.work, self.options, own, others)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.checkpoint.folder)

    @cached_property
    def _windows(self) -> tuple[list[list[int]], list[list[int]]]:
        return compared_windows(self.task, self._tokenizer, self.options)

    @cached_property
    def _described(self) -> dict[str, object]:
        """What decides the numbers of every cell."""
        own, others = self._windows
        active = self.checkpoint.active_parameters
        searched = search_windows([self.task], self._tokenizer, active)
        info = calibration_settings(self.checkpoint, self.task, self.options)
        return {
            "source": source_fingerprint(),
            "text": windows_fingerprint([*own, *others, *searched]),
            "options": self.options.model_dump(mode="json"),
            "calibration": info.model_dump(mode="json", exclude={"options"}),
        }


def source_fingerprint() -> str:
    """sha256 of the program's own source files: other code may measure other numbers."""
    root = Path(edge_moe.__file__).parent
    found = [
        Path(folder) / name
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.endswith(".py")
    ]
    digest = hashlib.sha256()
    for path in sorted(found):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def _measure(ready: Bench, share: float, settings: str, work: Path, name: str) -> Cell:
    """All methods at one share."""
    spec, options = ready.spec, ready.options
    forms = candidate_forms(spec, options.target)
    full_bytes = full_expert_bytes(spec, options.target)
    evidence = gather_evidence(
        *(spec, ready.stats, forms, options.target, int(share * full_bytes)),
        gradients=ready.gradients,
    )
    problem = evidence.problem
    _require_possible(problem, share, full_bytes)
    rivals, missing = contenders(
        Field(problem, forms, ready.stats, evidence.supers, gemq_cost(spec, forms, ready.gradients))
    )
    found = _score_choices(ready, rivals, forms)  # first: packing is then no part of the search
    plans, rounds, record = _own_plans(ready, evidence, forms)
    parts = [*loss_variants(evidence), *rounds]
    found |= _score_choices(ready, [*plans, *parts], forms)
    wanted = wanted_transforms(problem, spec, forms, options.transforms)
    results = [_result(ready, problem, forms, each, found[each.name]) for each in [*plans, *rivals]]
    made, refused = _score_transforms(ready, work, wanted)
    any_score = next(iter(found.values()))
    own, others = _split(ready, any_score)
    return Cell(
        settings=settings,
        provenance=Provenance.published(),
        model=name,
        task=ready.task,
        options=options,
        share=share,
        full_expert_bytes=full_bytes,
        budget_bytes=problem.budget_bytes,
        quantiser=ready.stats.info.quantiser,
        num_in_task_tokens=ready.num_own_tokens,
        num_off_task_tokens=any_score.kld.size - ready.num_own_tokens,
        in_task_base_ppl=metrics.perplexity(own.base_nll),
        off_task_base_ppl=None if others is None else metrics.perplexity(others.base_nll),
        search=record,
        scores=[*results, *made],
        parts=[_result(ready, problem, forms, each, found[each.name]) for each in parts],
        missing=[*missing, *refused],
    )


def _require_room(spec: ModelSpec, share: float, target: Target) -> None:
    """Refuse at once what no plan could fit: top_k experts per layer in the smallest form."""
    least_share = least_expert_bytes(spec, target) / full_expert_bytes(spec, target)
    if share < least_share:
        raise InputError(
            f"{share:.1%} of the experts' bytes hold no plan: {spec.top_k} experts per layer in "
            f"{candidate_forms(spec, target)[1]} take {least_share:.2%}"
        )


def _require_possible(problem: Problem, share: float, full_bytes: int) -> None:
    least_bytes = smallest_bytes(problem)
    if least_bytes is None or least_bytes > problem.budget_bytes:
        needed = 1.0 if least_bytes is None else least_bytes / full_bytes
        raise InputError(
            f"{share:.1%} of the experts' bytes ({format_bytes(problem.budget_bytes)}) hold no "
            f"plan: the smallest share is {needed:.2%}"
        )


def _own_plans(
    ready: Bench, evidence: Evidence, forms: Sequence[str]
) -> tuple[list[Contender], list[Contender], SearchRecord]:
    """(edge-moe's plan, with and without the search; the best after every round; the record)."""
    plain = solve(evidence.problem, SOLVE_SECONDS)
    rounds: list[Contender] = []
    seconds, label = ready.options.search_seconds, f"{ready.task}: searching"
    with progress_bar() as progress:
        bar = progress.add_task(label, total=1.0)
        measure = PlanMeasure(
            ready.checkpoint,
            ready.stats.info,
            [ready.task],
            ready.packed,
        )
        best, record = search(
            *(evidence, plain, by_name(measure, forms), seconds),
            lambda share: progress.update(bar, completed=share),
            lambda name, choice: rounds.append(Contender(f"after {name}", Kind.PLAN, choice)),
        )
    found = [Contender("edge-moe plan", Kind.PLAN, best.choice)]
    if record.chosen != PLAN_NAME:
        found.append(Contender("edge-moe plan, no search", Kind.PLAN, plain.choice))
    return found, rounds, measure.described(record)


def _score_choices(
    ready: Bench, chosen: Sequence[Contender], forms: Sequence[str]
) -> dict[str, TokenScores]:
    """Scores by name; equal choices are run once."""
    found: dict[str, TokenScores] = {}
    with progress_bar() as progress:
        bar = progress.add_task(f"{ready.task}: scoring", total=len(chosen))
        for part in _parts(chosen):
            variants = {each.name: name_forms(each.choice, forms) for each in part}
            found |= ready.scorer.score(variants, whole=ready.whole)
            progress.advance(bar, len(part))
    return found


def _parts(chosen: Sequence[Contender]) -> Iterator[Sequence[Contender]]:
    for start in range(0, len(chosen), MAX_PASS_PROPOSALS):
        yield chosen[start : start + MAX_PASS_PROPOSALS]


def _score_transforms(
    ready: Bench, work: Path, wanted: Sequence[WantedTransform]
) -> tuple[list[Score], list[str]]:
    """(scores, why others do not exist); one transformed checkpoint on disk at a time."""
    found, refused = [], []
    model = ready.checkpoint.folder
    for each in transformed(model, ready.task, ready.stats_folder, work, wanted):
        if each.folder is None:
            refused.append(each.refusal)
            continue
        found.append(_score_transformed(ready, each.wanted, each.folder))
    return found, refused


def _score_transformed(ready: Bench, wanted: WantedTransform, folder: Path) -> Score:
    """A transformed checkpoint, its experts in one form, beside the original."""
    checkpoint = Checkpoint(folder)
    spec, info = checkpoint.spec, ready.stats.info
    packer = text_packer(checkpoint, info.options, info.data_fingerprint)
    scorer = VariantScorer(checkpoint, ready.windows, PackedExperts(checkpoint, packer))
    forms = [[wanted.form] * spec.num_experts] * spec.num_moe_layers
    scores = scorer.score({wanted.name: forms}, whole=ready.whole)[wanted.name]
    return _score(
        ready,
        scores,
        name=wanted.name,
        kind=Kind.MERGE,
        expert_bytes=wanted.expert_bytes,
        num_kept=spec.num_experts * spec.num_moe_layers,
        forms={wanted.form: spec.num_experts * spec.num_moe_layers},
    )


def _result(
    ready: Bench,
    problem: Problem,
    forms: Sequence[str],
    contender: Contender,
    scores: TokenScores,
) -> Score:
    names = [name for row in name_forms(contender.choice, forms) for name in row]
    return _score(
        ready,
        scores,
        name=contender.name,
        kind=contender.kind,
        expert_bytes=problem.bytes_of(contender.choice),
        num_kept=int(np.count_nonzero(contender.choice)),
        forms={form: names.count(form) for form in FORM_NAMES if form in names and form != DROP},
    )


def _score(
    ready: Bench,
    scores: TokenScores,
    *,
    name: str,
    kind: Kind,
    expert_bytes: int,
    num_kept: int,
    forms: dict[str, int],
) -> Score:
    own, others = _split(ready, scores)
    return Score(
        name=name,
        kind=kind,
        expert_bytes=expert_bytes,
        num_kept=num_kept,
        forms=forms,
        in_task=_text_score(own),
        off_task=None if others is None else _text_score(others),
    )


def _text_score(scores: TokenScores) -> TextScore:
    return TextScore(
        kld=metrics.mean_and_error(scores.kld),
        ppl=metrics.perplexity(scores.nll),
        same_top=metrics.mean_and_error(scores.is_same_top),
    )


def _split(ready: Bench, scores: TokenScores) -> tuple[TokenScores, TokenScores | None]:
    """(on the task's windows, on the others)."""
    own, others = scores.split(ready.num_own_tokens)
    return own, others if others.kld.size else None


def _announce(cell: Cell) -> None:
    """One line on stderr about a finished cell."""
    best = min(cell.scores, key=lambda score: score.in_task.kld.value)
    Console(stderr=True, highlight=False, markup=False).print(
        f"{cell.task}, {cell.share:.1%}: best of {len(cell.scores)} is {best.name}, "
        f"KL {best.in_task.kld}; edge-moe's plan {cell.plan.in_task.kld}",
        soft_wrap=True,
    )
