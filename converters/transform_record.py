"""What a transform did: `transform.json` beside the weights, and the README.md that says it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from pydantic import BaseModel, ConfigDict

import edge_moe
from edge_moe.converters.model_card import (
    SizeRow,
    base_model,
    carried_front_matter,
    with_total,
)
from edge_moe.converters.transform_request import Request
from edge_moe.converters.transform_scores import Scores
from edge_moe.converters.transforms import get_method
from edge_moe.converters.transforms.heapr import fitting_forms
from edge_moe.files import write_text
from edge_moe.reproduce import command_line, model_name, model_remark, public_model

RECORD_NAME = "transform.json"

_CARD = Template("""\
---
base_model: $base_yaml
${carried}library_name: transformers
tags:
- edge-moe
- moe
- mixture-of-experts
$tags
---
# $name

$base, made smaller for $tasks with edge-moe $version, method $method ($source).
$shrunk

| bytes | source | here | |
|---|---:|---:|---:|
$sizes

## Use

```
transformers.AutoModelForCausalLM.from_pretrained($name_repr)
```

## Made with

```
$command
```
$model_remark
| | |
|---|---|
| settings | $settings |
| calibration | $num_tokens tokens$sampled |
| super experts | $super_experts |
| source checkpoint, sha256 | `$model_fingerprint` |
| calibration text, sha256 | `$data_fingerprint` |
$more_rows
`$record_name` lists, for every layer, which source experts became which expert.

## Notes

$notes
""")


class LayerRecord(BaseModel):
    """One transformed layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer_id: int
    members: list[list[int]]
    """For each new expert, the source experts in it; the first one's router row was kept."""
    facts: dict[str, float]


class TransformRecord(BaseModel):
    """A finished transform."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    edge_moe_version: str
    method: str
    source: str
    settings: dict[str, str | int | float]
    model: str
    model_fingerprint: str
    tasks: list[str]
    """What scores come from: the tasks of the statistics."""
    data_fingerprint: str
    """Of the whole calibration text that scores come from."""
    stats: str | None
    """Name of the folder of statistics that was given; None where they were measured here."""
    stats_fingerprint: str | None
    """sha256 over the statistics that were given."""
    sample_fingerprint: str | None
    """Of the text that layers were run on; None where the method needs no samples."""
    window_tokens: int
    """What the user allowed of the text of `--task`; where statistics were given, none but samples
    come from it."""
    max_windows: int | None
    max_sample_tokens: int | None
    """What the user allowed; None: as the method says."""
    num_tokens: int
    """Tokens of the calibration text that scores come from."""
    sample_tokens: int
    """Tokens that the layers were run on; 0 where the method needs no samples."""
    num_experts: int
    source_num_experts: int
    expert_width: int
    source_expert_width: int
    super_experts: list[tuple[int, int]] | None
    """(layer_id, expert_id); None where they were not looked for."""
    forms: list[str]
    """Packed forms that the new experts fit."""
    lost_forms: list[str]
    """Forms that the source's experts fit and these do not."""
    notes: list[str]
    layers: list[LayerRecord]
    source_transform: dict[str, Any] | None
    """The record of the source, where it was a transform itself."""

    def save(self, folder: Path) -> None:
        """Write `transform.json`."""
        write_text(folder / RECORD_NAME, self.model_dump_json(indent=1) + "\n")


def _source_record(folder: Path) -> dict[str, Any] | None:
    """The record beside a source that was transformed before."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def make_record(request: Request, scores: Scores, layers: Sequence[LayerRecord]) -> TransformRecord:
    """The record of a finished transform."""
    spec = request.checkpoint.spec
    forms = fitting_forms(spec, request.expert_width)
    lost = [form for form in fitting_forms(spec, spec.expert_width) if form not in forms]
    return TransformRecord(
        edge_moe_version=edge_moe.__version__,
        method=request.method.name,
        source=request.method.source,
        settings=request.settings,
        model=model_name(request.name),
        model_fingerprint=request.checkpoint.fingerprint,
        tasks=list(scores.info.tasks),
        data_fingerprint=scores.info.data_fingerprint,
        stats=scores.folder.absolute().name if scores.folder else None,
        stats_fingerprint=scores.fingerprint,
        sample_fingerprint=request.info.data_fingerprint if request.sampled else None,
        window_tokens=request.limits.window_tokens,
        max_windows=request.limits.max_windows,
        max_sample_tokens=request.limits.sample_tokens,
        num_tokens=scores.info.num_tokens,
        sample_tokens=request.sample_tokens,
        num_experts=request.num_experts,
        source_num_experts=spec.num_experts,
        expert_width=request.expert_width,
        source_expert_width=spec.expert_width,
        super_experts=scores.super_experts(),
        forms=list(forms),
        lost_forms=lost,
        notes=_notes(request, lost),
        layers=list(layers),
        source_transform=_source_record(request.checkpoint.folder),
    )


def transform_card(
    record: TransformRecord, folder: Path, name: str, sizes: Sequence[SizeRow]
) -> str:
    """The text of README.md; `folder` is the source. Holds no date: equal runs, equal bytes."""
    base = base_model(record.model, folder)
    return _CARD.substitute(
        base_yaml=json.dumps(base),
        base=base,
        carried=carried_front_matter(folder / "README.md"),
        tags="\n".join(f"- {json.dumps(tag)}" for tag in (record.method, *record.tasks)),
        name=name,
        name_repr=repr(name),
        tasks=", ".join(f"`{task}`" for task in record.tasks),
        version=edge_moe.__version__,
        method=record.method,
        source=record.source,
        shrunk=_shrunk(record),
        sizes="\n".join(row.text() for row in with_total(sizes)),
        command=_command(record, public_model(base), name),
        model_remark=model_remark(base),
        settings=", ".join(f"{key} {value}" for key, value in record.settings.items()) or "none",
        num_tokens=f"{record.num_tokens:,}",
        sampled=f", layers run on {record.sample_tokens:,}" if record.sample_tokens else "",
        super_experts=_super_experts(record),
        model_fingerprint=record.model_fingerprint,
        data_fingerprint=record.data_fingerprint,
        more_rows=_more_rows(record),
        record_name=RECORD_NAME,
        notes="\n".join(f"- {note}" for note in record.notes) or "- None.",
    )


def _shrunk(record: TransformRecord) -> str:
    if record.num_experts != record.source_num_experts:
        return (
            f"Every layer has {record.num_experts} experts instead of {record.source_num_experts}."
        )
    return f"Every expert is {record.expert_width} wide instead of {record.source_expert_width}."


def _super_experts(record: TransformRecord) -> str:
    if record.super_experts is None:
        return "not looked for"
    return ", ".join(f"{layer}.{expert}" for layer, expert in record.super_experts) or "none"


def _more_rows(record: TransformRecord) -> str:
    """Where scores and samples come from, as far as it differs from one text read here."""
    rows = []
    if record.sample_fingerprint not in (None, record.data_fingerprint):
        rows.append(f"| text that layers were run on, sha256 | `{record.sample_fingerprint}` |\n")
    if record.stats is not None:
        rows.append(f"| statistics `{record.stats}`, sha256 | `{record.stats_fingerprint}` |\n")
    return "".join(rows)


def _command(record: TransformRecord, model: str, name: str) -> str:
    parts = [model, "--method", record.method]
    if get_method(record.method).shrinks == "experts":
        parts += ["--experts", str(record.num_experts)]
    else:
        parts += ["--width", str(record.expert_width)]
    for task in record.tasks:
        parts += ["--task", task]
    if record.stats is not None:
        parts += ["--stats", record.stats]
    for key, value in record.settings.items():
        parts += ["--set", f"{key}={value}"]
    parts += ["--window-tokens", str(record.window_tokens)]
    if record.max_windows is not None:
        parts += ["--max-windows", str(record.max_windows)]
    if record.max_sample_tokens is not None:
        parts += ["--sample-tokens", str(record.max_sample_tokens)]
    return command_line("transform", *parts, "-o", name)


def _notes(request: Request, lost: Sequence[str]) -> list[str]:
    notes = []
    remaining = fitting_forms(request.checkpoint.spec, request.expert_width)
    if lost:
        notes.append(
            f"Rows of {request.expert_width} weights fit fewer packed forms than the source: "
            f"{', '.join(lost)} are gone, {', '.join(remaining)} remain."
        )
    if request.checkpoint.unused_tensors:
        notes.append(
            f"{len(request.checkpoint.unused_tensors)} tensors of multi-token prediction layers "
            "were left out: they hold experts of their own, and plain decoding does not use them."
        )
    return notes
