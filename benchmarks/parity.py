"""Which models work, for which targets, and how exactly? Builds a tiny model of every family.

    python benchmarks/parity.py [--family qwen3_moe] [--target gguf]

A random checkpoint of each family goes through inspect, calibrate, plan, build and run, for every
target. Three builds are compared with transformers in float32: one that keeps all experts, one that
drops about half of them, against the whole model with those experts masked out of its routers, and
one of about 4 bits per weight, against the whole model with the values that those bits keep.
Hugging Face folders stay in 16 bits. llama.cpp looks GELU up in a table, and beside weights of 4
bits it rounds activations to 8: the model that GGUF is compared with does both. What the table
changes is measured too. A rounding to the other side of a tie is a step of 8 bits in one token and
a trace in those after it, so that cell is the median over tokens; all others are the largest.
Prints the table of the README and writes it, and benchmarks/results/parity.json, when all families
and targets were measured. An empty cell holds the error that edge-moe raised.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: spinning threads stall

import math
import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from reference_model import (
    TOKENS,
    FloatArray,
    dequantised,
    load,
    logits,
    masked,
    q8_0_inputs,
    table_gelu,
)
from rich.console import Console
from tiny_models import make_tiny_checkpoint

from edge_moe.budget import resident_expert_bytes
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import GGUF_NAME, build
from edge_moe.converters.calibrate import calibrate
from edge_moe.errors import EdgeMoeError, MissingExtraError
from edge_moe.families import FAMILIES
from edge_moe.files import write_text
from edge_moe.formats import DROP, expert_bytes, form_fits
from edge_moe.inspect import inspect_model
from edge_moe.measurement import Provenance
from edge_moe.onnx_folder import OnnxOptions
from edge_moe.plan import Plan, Target
from edge_moe.planner import make_plan
from edge_moe.runtime.evaluate import open_model
from edge_moe.runtime.kernel_choice import Kernels
from edge_moe.spec import ModelSpec

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "parity.json"
README = ROOT / "README.md"
MARKS = "<!-- benchmarks/parity.py writes this table -->\n", "<!-- end of the table -->\n"
TARGETS: tuple[Target, ...] = ("native", "hf", "gguf", "onnx")
HEADINGS = {"native": "native", "hf": "Hugging Face", "gguf": "GGUF", "onnx": "ONNX"}
LARGEST_ERROR = 1e-3
"""No cell may have more. The largest logits are 1 to 5."""
_EXACT = {"gguf": "f32", "onnx": "f32"}
"""Form in which llama.cpp and onnxruntime compute in float32; the others store bf16 and do so."""
_QUANTISED: dict[Target, tuple[str, ...]] = {
    "native": ("q4_0",),
    "gguf": ("q4_0",),
    "onnx": ("int4_b64", "int4_b32"),
}
"""Forms of about 4 bits; the first that fits is used."""
Kind = Literal["whole", "pruned", "quantised"]
_FIELDS: dict[Kind, str] = {
    "whole": "keep_all_error",
    "pruned": "pruned_error",
    "quantised": "quantised_error",
}
_WITH_TIES = ("gguf", "quantised")
"""Where activations are rounded, and may be so to the other side."""
_LEAST_EFFECT = 0.01
"""Dropping half of the experts changes some logit by more, or the pruned cells prove nothing."""
_GENEROUS_BYTES = 10**9
_CONTEXT_TOKENS = 320
_TEXT = "def add(a, b):\n    return a + b\n\nIt was a fine evening, and 12 + 7 = 19.\n" * 12


class Cell(BaseModel):
    """One family built for one target."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str
    target: Target
    keep_all_error: float | None = None
    """Largest absolute difference of a logit from transformers, all experts kept."""
    pruned_error: float | None = None
    """The same with dropped experts, from transformers with those masked out."""
    quantised_error: float | None = None
    """The same with experts of about 4 bits, from transformers with the values that they keep.

    GGUF: of the largest of each token, the median.
    """
    reason: str = ""
    """Why an error is missing: what edge-moe said."""
    remark: str = ""
    """What the target is known to compute a little differently, as `edge-moe plan` says it too."""
    unmodified_error: float | None = None
    """`keep_all_error` from transformers as it is, where the model compared looks GELU up."""
    unmodified_median_error: float | None = None
    """The same, of the largest of each token the median."""

    @property
    def errors(self) -> dict[str, float | None]:
        """By kind of build."""
        return {kind: getattr(self, _FIELDS[kind]) for kind in _kinds(self.target)}

    @property
    def note(self) -> str:
        """What the README says below the table."""
        if self.unmodified_error is None:
            return self.reason or self.remark
        return (
            f"{self.remark} The model compared looks it up too. From transformers as it is, half "
            f"of the tokens differ by at most {self.unmodified_median_error:.1g}, the worst by "
            f"{self.unmodified_error:.1g}."
        )


class Parity(BaseModel):
    """benchmarks/results/parity.json"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provenance: Provenance
    num_tokens: int
    largest_logit: dict[str, float]
    """Of the whole model of each family: what an error is to be compared with."""
    cells: list[Cell]


class Subject:
    """A tiny checkpoint of one family that was inspected, calibrated and planned."""

    def __init__(self, folder: Path, work: Path) -> None:
        """`work` gets the statistics and the builds."""
        inspect_model(str(folder))
        self.checkpoint = Checkpoint(folder)
        self.work = work
        text = work / "mine.txt"
        text.write_text(_TEXT, encoding="utf-8")
        self._stats = calibrate(
            folder, [str(text)], work / "stats", window_tokens=128, forms=(), quantiser="nearest"
        )
        self._model = load(folder)
        self.expected = logits(self._model)
        self._kept = self._plan("hf", self._half_of_the_experts()).forms

    @property
    def family(self) -> str:
        return self.checkpoint.spec.model_type

    def cell(self, target: Target) -> Cell:
        """Both builds for `target`, or what edge-moe says against them.

        Raises:
            MissingExtraError: a package that the target needs is not installed.
        """
        errors: dict[str, float] = {}
        reason = ""
        try:
            for kind in _kinds(target):
                errors[_FIELDS[kind]] = self._error(target, kind)
            if target == "gguf":
                errors |= self._unmodified_errors()
        except MissingExtraError:
            raise
        except EdgeMoeError as error:
            errors, reason = {}, shortened(str(error), self.family)
        remark = " ".join(self.checkpoint.spec.family.gguf_limits) if target == "gguf" else ""
        return Cell(family=self.family, target=target, reason=reason, remark=remark, **errors)

    def built(self, target: Target, kind: Kind) -> Path:
        """The folder of a build: all experts, about half of them, or all of them in 4 bits."""
        plan = self._plan(target)
        forms = self._kept if kind == "pruned" else plan.forms
        rows = [
            [each if each == DROP else form for each in row]
            for form, row in zip(self._forms(target, kind).values(), forms, strict=True)
        ]
        plan = _with_forms(plan, rows, self.checkpoint.spec)
        options = OnnxOptions(is_exact=True) if target == "onnx" else None
        return build(plan, self.work / f"{target}-{kind}", onnx=options)

    def _forms(self, target: Target, kind: Kind) -> dict[int, str]:
        """Form of the kept experts, by MoE layer.

        GGUF keeps the last layer in float32, so that everything but experts is in float32 too.
        """
        spec = self.checkpoint.spec
        exact = _EXACT.get(target, "bf16")
        if kind != "quantised":
            return dict.fromkeys(spec.moe_layer_ids, exact)
        form = next(each for each in _QUANTISED[target] if form_fits(each, *spec.expert_shape))
        forms = dict.fromkeys(spec.moe_layer_ids, form)
        return forms | ({spec.moe_layer_ids[-1]: exact} if target == "gguf" else {})

    def _plan(self, target: Target, budget_bytes: int = _GENEROUS_BYTES) -> Plan:
        model = str(self.checkpoint.folder)
        return make_plan(
            *(self.checkpoint, self._stats, budget_bytes),
            model=model,
            target=target,
            context_tokens=_CONTEXT_TOKENS,
            runtime=(10**6, "assumed"),
        )

    def _half_of_the_experts(self) -> int:
        """The budget, as target hf, in which about half of the experts fit."""
        plan, spec = self._plan("hf"), self.checkpoint.spec
        one = expert_bytes(plan.forms[0][0], *spec.expert_shape)
        return plan.total_bytes - spec.num_moe_layers * (spec.num_experts // 2) * one

    def _error(self, target: Target, kind: Kind) -> float:
        """Build and run: the largest absolute difference of a logit."""
        output = self.built(target, kind)
        path = output / GGUF_NAME if target == "gguf" else output
        kernels: Kernels | None = "exact" if target == "native" else None
        with closing(open_model(path, context_tokens=_CONTEXT_TOKENS, kernels=kernels)) as model:
            list(model.generate("def f(", max_new_tokens=4, stop=()))
            found = model.logits(TOKENS)
        if target == "hf":  # whose own program is transformers
            found = logits(load(output))
        expected = self._reference(target, kind)
        if target == "gguf" and kind == "whole":
            self._whole_gguf = found, expected
        by_token = _by_token(found, expected)
        return float(np.median(by_token) if (target, kind) == _WITH_TIES else by_token.max())

    def _unmodified_errors(self) -> dict[str, float]:
        """GGUF from transformers as it is, where the model that it is compared with is not."""
        found, compared = self._whole_gguf
        if np.array_equal(compared, self.expected):
            return {}
        by_token = _by_token(found, self.expected)
        return {
            "unmodified_error": float(by_token.max()),
            "unmodified_median_error": float(np.median(by_token)),
        }

    def _reference(self, target: Target, kind: Kind) -> FloatArray:
        """transformers' logits, without what a "pruned" or "quantised" build lacks."""
        if target != "gguf":
            return self._logits(self._model, target, kind)
        with table_gelu():
            return self._logits(load(self.checkpoint.folder), target, kind)

    def _logits(self, model: Any, target: Target, kind: Kind) -> FloatArray:
        whole = logits(model)
        if kind == "whole":
            return whole
        found = self._masked(model) if kind == "pruned" else self._quantised(model, target)
        if np.abs(found - whole).max() < _LEAST_EFFECT:
            raise RuntimeError(f"{self.family}: {kind} changes no logit")
        return found

    def _masked(self, model: Any) -> FloatArray:
        spec = self.checkpoint.spec
        dropped = {
            layer_id: [expert_id for expert_id, form in enumerate(row) if form == DROP]
            for layer_id, row in zip(spec.moe_layer_ids, self._kept, strict=True)
        }
        with masked(model, spec, dropped):
            return logits(model)

    def _quantised(self, model: Any, target: Target) -> FloatArray:
        forms = self._forms(target, "quantised")
        with dequantised(model, self.checkpoint, forms):
            if target != "gguf":
                return logits(model)
            layer_ids = [layer_id for layer_id, form in forms.items() if form != _EXACT["gguf"]]
            with q8_0_inputs(model, self.checkpoint.spec, layer_ids):
                return logits(model)


def _kinds(target: Target) -> Sequence[Kind]:
    """The builds of a cell."""
    return [kind for kind in _FIELDS if kind != "quantised" or target in _QUANTISED]


def _by_token(found: FloatArray, expected: FloatArray) -> FloatArray:
    """[T] largest absolute difference of each token's logits."""
    by_token: FloatArray = np.abs(found - expected).max(axis=1)
    return by_token


def _with_forms(plan: Plan, forms: list[list[str]], spec: ModelSpec) -> Plan:
    """`plan` with other forms, where those live, and what they take."""
    num_bytes = sum(resident_expert_bytes(spec, form, plan.target) for row in forms for form in row)
    terms = [
        term.model_copy(update={"num_bytes": num_bytes}) if term.name == "experts" else term
        for term in plan.terms
    ]
    tiers = [["none" if form == DROP else "device" for form in row] for row in forms]
    return plan.model_copy(update={"forms": forms, "tiers": tiers, "terms": terms})


def shortened(message: str, family: str) -> str:
    """An error without the family and the target, which its cell names, and without the remedy.

    Equal reasons of several families become equal texts.
    """
    text = re.sub(r"^target \w+:? ", "", message).replace(f" {family!r}", "")
    return text.rpartition(": ")[0] or text


def measure(
    families: Sequence[str], targets: Sequence[Target], work: Path, console: Console
) -> Parity:
    """Every cell of the given families and targets; `work` is an empty folder."""
    cells, largest = [], {}
    for family in families:
        own = work / family
        own.mkdir()
        subject = Subject(make_tiny_checkpoint(own / "model", family), own)
        largest[family] = float(np.abs(subject.expected).max())
        for target in targets:
            cells.append(subject.cell(target))
            console.print(f"{family} as {target}: {_text(cells[-1])} {cells[-1].reason}")
    return Parity(
        provenance=Provenance.published(),
        num_tokens=len(TOKENS),
        largest_logit=largest,
        cells=cells,
    )


def table(found: Parity) -> str:
    """The README's table: errors of the builds of each cell, and notes below."""
    targets = [target for target in TARGETS if any(cell.target == target for cell in found.cells)]
    notes = list(dict.fromkeys(cell.note for cell in found.cells if cell.note))
    lines = [
        f"| family | {' | '.join(HEADINGS[target] for target in targets)} |",
        "|---|" + "---|" * len(targets),
    ]
    for family in found.largest_logit:
        cells = {cell.target: cell for cell in found.cells if cell.family == family}
        row = [cells[target] for target in targets]
        lines.append(f"| {family} | {' | '.join(_text(cell, notes) for cell in row)} |")
    numbered = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([*lines, *([""] if notes else []), *numbered, ""])


def _text(cell: Cell, notes: Sequence[str] = ()) -> str:
    parts = ["-" if error is None else _rounded(error) for error in cell.errors.values()]
    shown = "-" if set(parts) == {"-"} else ", ".join(parts)
    return f"{shown} ({notes.index(cell.note) + 1})" if cell.note in notes else shown


def _rounded(error: float) -> str:
    """One digit, rounded up: 2e-6."""
    if error == 0:
        return "0"
    exponent = math.floor(math.log10(error))
    digit = math.ceil(round(error / 10**exponent, 6))
    return f"{digit}e{exponent}" if digit < 10 else f"1e{exponent + 1}"


def with_table(readme: str, found: Parity) -> str:
    """The README with the table between its marks replaced."""
    before, _, rest = readme.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{table(found)}\n{MARKS[1]}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", action="append", choices=sorted(FAMILIES), help="repeatable")
    parser.add_argument("--target", action="append", choices=TARGETS, help="repeatable")
    arguments = parser.parse_args()
    console = Console(width=200)
    with TemporaryDirectory(prefix="edge-moe-") as work:
        found = measure(
            arguments.family or sorted(FAMILIES),
            arguments.target or TARGETS,
            Path(work),
            Console(stderr=True, width=200),
        )
    console.print(table(found), markup=False)
    if arguments.family or arguments.target:
        return
    write_text(RESULTS, found.model_dump_json(indent=1) + "\n")
    write_text(README, with_table(README.read_text(encoding="utf-8"), found))


if __name__ == "__main__":
    main()
