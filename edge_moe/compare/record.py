"""What a comparison measured: one JSON file per task, size and target."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from pydantic import BaseModel, ConfigDict

from edge_moe.compare.contenders import Kind
from edge_moe.demo import task_names
from edge_moe.errors import InputError
from edge_moe.files import write_text
from edge_moe.json_files import checked, read_json
from edge_moe.measurement import Provenance
from edge_moe.metrics import Estimate
from edge_moe.plan import SearchRecord, Target
from edge_moe.tasks import task_argument

COMPARISON_VERSION: Literal[1] = 1


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CompareOptions(_Model):
    """What decides the numbers, beside the model, the task and the size."""

    target: Target = "native"
    search_seconds: float = 240.0
    max_windows: int = 24
    """Held-out windows of the task that are reported on; others choose between plans."""
    off_task_windows: int = 2
    """Held-out windows of every other shipped task."""
    transforms: tuple[str, ...] = ()
    """Methods that write other weights."""
    calibration_windows: int | None = None


class TextScore(_Model):
    """Quality on one text, beside the whole model on the same tokens."""

    kld: Estimate
    """Mean KL divergence from the whole model, nats per token."""
    ppl: Estimate
    same_top: Estimate
    """Share of tokens whose most likely next token is the whole model's."""


class Score(_Model):
    """One method at one size."""

    name: str
    kind: Kind
    expert_bytes: int
    num_kept: int
    """Experts of the whole model that are left."""
    forms: dict[str, int]
    in_task: TextScore
    off_task: TextScore | None


class Cell(_Model):
    """All methods for one task at one size under one target's rules."""

    version: Literal[1] = COMPARISON_VERSION
    settings: str
    """sha256 of everything that decides the numbers, the program's own source included."""
    options: CompareOptions
    provenance: Provenance
    model: str
    task: str
    share: float
    """Of the experts' 16-bit bytes."""
    full_expert_bytes: int
    budget_bytes: int
    """For the experts."""
    quantiser: str
    num_in_task_tokens: int
    num_off_task_tokens: int
    in_task_base_ppl: Estimate
    off_task_base_ppl: Estimate | None
    search: SearchRecord
    """How edge-moe's plan was found."""
    scores: list[Score]
    parts: list[Score] = []
    """edge-moe's plan with one part of it changed: by other losses, and after each round of the
    search. No rivals: they say what each part is worth."""
    missing: list[str]
    """Methods that do not exist at this size, and why, in sentences."""

    @property
    def target(self) -> Target:
        return self.options.target

    @property
    def file_name(self) -> str:
        return cell_name(self.task, self.target, self.share)

    @property
    def plan(self) -> Score:
        """edge-moe's own."""
        return next(score for score in self.scores if score.kind is Kind.PLAN)

    def best(self, *kinds: Kind) -> Score | None:
        """The lowest in-task KL divergence among methods of these kinds."""
        found = [score for score in self.scores if score.kind in kinds]
        return min(found, key=lambda score: score.in_task.kld.value, default=None)

    def random_mean(self) -> Score | None:
        """The random draws in the number of bits that did best, as one score: their means.

        Errors are the spread between the draws.
        """
        best = self.best(Kind.RANDOM)
        if best is None:
            return None
        bits = best.name.rpartition(", ")[2]
        draws = [
            score
            for score in self.scores
            if score.kind is Kind.RANDOM and score.name.rpartition(", ")[2] == bits
        ]
        others = [draw.off_task for draw in draws if draw.off_task is not None]
        return best.model_copy(
            update={
                "name": f"mean and spread of {len(draws)} draws, {bits}",
                "in_task": _mean([draw.in_task for draw in draws]),
                "off_task": _mean(others) if others else None,
            }
        )

    def save(self, folder: Path) -> Path:
        """Write the cell, atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.file_name
        write_text(path, self.model_dump_json(indent=1) + "\n")
        return path


def _mean(scores: Sequence[TextScore]) -> TextScore:
    """Mean of every figure, its error the standard deviation between the scores."""

    def of(name: str) -> Estimate:
        values = [getattr(score, name).value for score in scores]
        spread = stdev(values) if len(values) > 1 else 0.0
        return Estimate(fmean(values), spread)

    return TextScore(kld=of("kld"), ppl=of("ppl"), same_top=of("same_top"))


def cell_name(task: str, target: Target, share: float) -> str:
    """File name of a cell."""
    return f"{task_key(task)}-{target}-{share:g}.json"


def task_key(task: str) -> str:
    """Short and safe for file names; files of one name are told apart by where they lie."""
    if task in task_names():
        return task
    where = hashlib.sha256(task_argument(task).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', Path(task).stem) or 'task'}-{where}"


def load_cell(path: Path) -> Cell:
    """Read what `Cell.save` wrote.

    Raises:
        InputError: missing, damaged, or of another version.
    """
    raw = read_json(path, InputError, missing=f"{path} does not exist", damaged="delete it")
    versions = (COMPARISON_VERSION,)
    return checked(raw, Cell, f"comparison {path}", versions=versions, again="delete it")


def load_cells(folder: Path) -> list[Cell]:
    """Every cell in `folder`, by task, target and falling size.

    Raises:
        InputError: none there, or a damaged one.
    """
    found = [load_cell(path) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise InputError(f"{folder} holds no comparison: run `edge-moe compare` first")
    return sorted(found, key=lambda cell: (cell.task, cell.target, -cell.share))
