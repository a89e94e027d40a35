"""Methods of the comparison that write other weights: merged, recombined or narrowed experts.

Each runs at the size that the bytes hold when its experts are then stored in 16, 8 or 4 bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from edge_moe.compare.contenders import BIT_CLASSES, counts_for, form_label, kept_forms
from edge_moe.converters.transform import transform
from edge_moe.converters.transforms import get_method
from edge_moe.converters.transforms.heapr import WIDTH_STEP
from edge_moe.errors import EdgeMoeError
from edge_moe.formats import expert_bytes, form_fits
from edge_moe.problem import Problem
from edge_moe.spec import ModelSpec

COMPARED = ("naee", "dern", "m-smoe", "sub-moe", "ream", "heapr")
"""Everything but `prune`, whose criteria are compared as plans."""


@dataclass(frozen=True)
class WantedTransform:
    """One method at one size, and the form its experts are stored in."""

    method: str
    form: str
    num_experts: int
    expert_width: int
    expert_bytes: int
    """Of all layers, in `form`."""

    @property
    def name(self) -> str:
        return f"{self.method}, {form_label(self.form)}"


@dataclass(frozen=True)
class Transformed:
    """A transformed checkpoint to be scored before the next is asked for, or why there is none."""

    wanted: WantedTransform
    folder: Path | None
    refusal: str = ""


def wanted_transforms(
    problem: Problem, spec: ModelSpec, forms: Sequence[str], methods: Sequence[str]
) -> list[WantedTransform]:
    """What fits the budget of `problem` and is smaller than the model."""
    found = []
    for method in methods:
        narrows = get_method(method).shrinks == "width"
        sizes = _narrowed(problem, spec, forms) if narrows else _fewer(problem, spec, forms)
        for form, num_experts, width in sizes:
            one = expert_bytes(form, spec.hidden_size, width)
            total = one * num_experts * spec.num_moe_layers
            found.append(WantedTransform(method, form, num_experts, width, total))
    return found


def transformed(
    model: Path, task: str, stats: Path, work: Path, wanted: Sequence[WantedTransform]
) -> Iterator[Transformed]:
    """Run every method in turn, once for all forms that want the same size.

    One checkpoint is on disk at a time: it is gone when the next one is asked for.
    """
    for (method, num_experts, width), group in groupby(wanted, key=_size):
        folder = work / f"{method}-{Path(task).stem}-{num_experts}x{width}"
        shutil.rmtree(folder, ignore_errors=True)  # of a killed run, perhaps from other text
        narrows = get_method(method).shrinks == "width"
        refusal = ""
        try:
            transform(
                model,
                [task],
                folder,
                method,
                num_experts=None if narrows else num_experts,
                expert_width=width if narrows else None,
                stats=stats,
            )
        except EdgeMoeError as error:
            refusal = str(error)
        for each in group:
            if refusal:
                yield Transformed(each, None, f"{each.name}: {refusal}")
            else:
                yield Transformed(each, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _size(wanted: WantedTransform) -> tuple[str, int, int]:
    return wanted.method, wanted.num_experts, wanted.expert_width


def _fewer(
    problem: Problem, spec: ModelSpec, forms: Sequence[str]
) -> Iterator[tuple[str, int, int]]:
    """(form, experts per layer, width) with as many whole experts as fit."""
    for index in kept_forms(forms):
        counts = counts_for(problem, index)
        if counts is not None and counts.min() < spec.num_experts:
            yield forms[index], int(counts.min()), spec.expert_width


def _narrowed(
    problem: Problem, spec: ModelSpec, forms: Sequence[str]
) -> Iterator[tuple[str, int, int]]:
    """(form, experts per layer, width) with all experts as wide as fits."""
    num_experts = spec.num_experts * spec.num_moe_layers
    offered = [forms[index] for index in kept_forms(forms)]
    for names in (*BIT_CLASSES, (forms[-1],)):
        if not set(names) & set(offered):
            continue  # the target does not store so few bits
        for width in range(spec.expert_width - WIDTH_STEP, 0, -WIDTH_STEP):
            form = next((name for name in names if form_fits(name, spec.hidden_size, width)), None)
            if form is None:
                continue
            taken_bytes = num_experts * expert_bytes(form, spec.hidden_size, width)
            if taken_bytes <= problem.budget_bytes:
                yield form, spec.num_experts, width
                break
