"""The README.md of a build: what it came from, what was done to it, how to do it again."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from edge_moe import __version__
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.slicing import DTYPE_OF_FORM
from edge_moe.formats import DROP
from edge_moe.gguf_model import GgufModel
from edge_moe.plan import Plan, Target
from edge_moe.reproduce import build_commands, model_name, model_remark, without_folders
from edge_moe.units import format_bytes

_CARRIED_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag")
_LIBRARIES = {"hf": "transformers", "native": "edge-moe", "gguf": "gguf", "onnx": "onnx"}

_CARD = Template("""\
---
${origin}${carried}library_name: $library
tags:
$tags
---
# $name

$base, made smaller for $tasks with edge-moe $version.
$kept

| form of an expert | experts |
|---|---:|
$forms

| bytes | source | here | |
|---|---:|---:|---:|
$sizes

Planned memory when it runs on $device with a context of $context tokens:

| term | bytes | where the number comes from |
|---|---:|---|
$terms

Predicted loss: $loss ($loss_unit).

## Use

```
$use
```

## Made with

```
$commands
```
$model_remark
| fingerprint | sha256 |
|---|---|
| plan | `$plan_fingerprint` |
| source checkpoint | `$model_fingerprint` |
| calibration statistics | `$stats_fingerprint` |

## Notes

$notes
""")


@dataclass(frozen=True)
class SizeRow:
    """One line of the table of bytes."""

    name: str
    source_bytes: int
    output_bytes: int

    def text(self) -> str:
        share = self.output_bytes / self.source_bytes if self.source_bytes else 1.0
        source, output = format_bytes(self.source_bytes), format_bytes(self.output_bytes)
        return f"| {self.name} | {source} | {output} | {share:.1%} |"


def size_rows(checkpoint: Checkpoint, dense_bytes: int, expert_bytes: int) -> list[SizeRow]:
    """The lines for a build whose dense part and experts take that many bytes."""
    experts = checkpoint.expert_tensors
    sizes = {name: info.num_bytes for name, info in checkpoint.tensors.items()}
    expert_source_bytes = sum(sizes[name] for name in experts)
    dense_source_bytes = sum(sizes.values()) - expert_source_bytes
    return [
        SizeRow("dense weights", dense_source_bytes, dense_bytes),
        SizeRow("experts", expert_source_bytes, expert_bytes),
    ]


def plan_fingerprint(plan: Plan) -> str:
    """sha256 of the plan's JSON."""
    return hashlib.sha256(plan.model_dump_json().encode()).hexdigest()


def model_card(
    plan: Plan,
    source: Checkpoint | GgufModel,
    name: str,
    target: Target,
    sizes: Sequence[SizeRow],
) -> str:
    """The text of README.md for a build called `name`. Holds no date: equal builds, equal bytes."""
    base = _base(plan, source)
    return _CARD.substitute(
        origin=_origin(plan, source),
        base=base,
        carried=_front_matter(source),
        library=_LIBRARIES[target],
        tags="\n".join(f"- {json.dumps(tag)}" for tag in _tags(plan)),
        name=name,
        tasks=", ".join(f"`{task}`" for task in plan.tasks),
        version=__version__,
        kept=_kept_sentence(plan),
        forms="\n".join(f"| {form} | {count} |" for form, count in _form_counts(plan).items()),
        sizes="\n".join(row.text() for row in with_total(sizes)),
        device=plan.device,
        context=plan.context_tokens,
        terms="\n".join(
            f"| {term.name} | {format_bytes(term.num_bytes)} | {term.source} |"
            for term in plan.terms
        ),
        loss=f"{plan.loss:.4g}",
        loss_unit=plan.loss_unit,
        use=_usage(name, target),
        commands="\n".join(
            build_commands(without_folders(plan.model_copy(update={"model": base})), name, target)
        ),
        model_remark=model_remark(base),
        plan_fingerprint=plan_fingerprint(plan),
        model_fingerprint=plan.model_fingerprint,
        stats_fingerprint=plan.stats_fingerprint,
        notes="\n".join(f"- {note}" for note in _notes(plan, source)),
    )


def base_model(model: str, folder: Path) -> str:
    """The hub id of the source where one is known, else the name of its folder."""
    named = model_name(model)
    return named if "/" in named else model_name(str(folder.resolve()))


def _base(plan: Plan, source: Checkpoint | GgufModel) -> str:
    """What the card calls the source."""
    named = base_model(plan.model, source.location)
    if "/" in named or not isinstance(source, GgufModel):
        return named
    stated = source.header.metadata.get("general.name")
    return stated if isinstance(stated, str) and stated.strip() else named


def _origin(plan: Plan, source: Checkpoint | GgufModel) -> str:
    """The hub's lines on the base model; none of a GGUF whose metadata name no repository.

    A relation is stated where experts are quantised; the hub knows none for dropping alone.
    """
    named = base_model(plan.model, source.location)
    if isinstance(source, GgufModel) and "/" not in named:
        named = _stated_repository(source)
    if not named:
        return ""
    forms = {form for row in plan.forms for form in row} - {DROP, *DTYPE_OF_FORM}
    relation = "base_model_relation: quantized\n" if forms else ""
    return f"base_model: {json.dumps(named)}\n{relation}"


def _stated_repository(source: GgufModel) -> str:
    """`owner/name` on the hub, from `general.base_model.0.repo_url` or the file's own source."""
    for key in ("general.base_model.0.repo_url", "general.source.repo_url"):
        url = source.header.metadata.get(key)
        found = re.fullmatch(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?", str(url))
        if found is not None:
            return found[1]
    return ""


def carried_front_matter(card: Path) -> str:
    """The licence, language and pipeline lines of the source's card, byte for byte."""
    if not card.is_file():
        return ""
    text = card.read_text(encoding="utf-8", errors="replace")
    match = re.match(r"---\r?\n(.*?\n)---\s*$", text, re.DOTALL | re.MULTILINE)
    if match is None:
        return ""
    # a member starts at the margin and runs until the next line that does
    members = re.findall(r"^([\w-]+):(.*\n(?:[ \t-].*\n|\n)*)", match.group(1), re.MULTILINE)
    return "".join(f"{key}:{rest}" for key, rest in members if key in _CARRIED_KEYS)


def _tags(plan: Plan) -> list[str]:
    tags = ["edge-moe", "moe", "mixture-of-experts"]
    if DROP in _form_counts(plan):
        tags.append("expert-pruning")
    return tags + [Path(task).stem for task in plan.tasks]


def _form_counts(plan: Plan) -> dict[str, int]:
    return dict(sorted(Counter(form for row in plan.forms for form in row).items()))


def _kept_sentence(plan: Plan) -> str:
    counts = [len(plan.kept(row)) for row in plan.forms]
    num_experts = len(plan.forms[0])
    share = sum(counts) / (len(counts) * num_experts)
    low, high = min(counts), max(counts)
    span = f"{low}" if low == high else f"{low} to {high}"
    return f"Every layer keeps {span} of its {num_experts} experts ({share:.0%} of all)."


def with_total(sizes: Sequence[SizeRow]) -> list[SizeRow]:
    if len(sizes) == 1:
        return list(sizes)
    source_bytes = sum(row.source_bytes for row in sizes)
    return [*sizes, SizeRow("**all**", source_bytes, sum(row.output_bytes for row in sizes))]


def _usage(name: str, target: Target) -> str:
    folder = shlex.quote(name)
    return {
        "native": f"edge-moe run {folder}",
        "hf": f"transformers.AutoModelForCausalLM.from_pretrained({name!r})",
        "gguf": f"llama-cli -m {folder}/model.gguf",
        "onnx": f"edge-moe run {folder}",
    }[target]


def _front_matter(source: Checkpoint | GgufModel) -> str:
    """Licence and language lines of the card in the source's folder, or a GGUF's own licence."""
    if not isinstance(source, GgufModel):
        return carried_front_matter(source.folder / "README.md")
    licence = source.header.metadata.get("general.license")
    stated = f"license: {json.dumps(licence)}\n" if isinstance(licence, str) else ""
    return carried_front_matter(source.path.parent / "README.md") or stated


def _notes(plan: Plan, source: Checkpoint | GgufModel) -> list[str]:
    notes = [*plan.limits, *plan.warnings]
    if source.unused_tensors and isinstance(source, GgufModel):
        notes.append(
            "Layers for multi-token prediction keep their first experts: they were not measured, "
            "and only guess ahead what the model itself decides."
        )
    elif source.unused_tensors:
        notes.append(
            f"{len(source.unused_tensors)} tensors of multi-token prediction layers were left "
            "out: they hold experts of their own, and plain decoding does not use them."
        )
    if not _front_matter(source):
        notes.append("The source folder had no model card: its licence is not repeated here.")
    return notes or ["None."]
