"""`edge-moe patterns`: compact expert patterns of tasks, for `edge-moe run --task`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_moe.commands.options import Output, Revision, SourceModel, stderr
from edge_moe.errors import InputError


def patterns_command(
    model: SourceModel,
    stats: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=DIR",
            help="A task's name and its statistics. Repeat for several.",
            show_default=False,
        ),
    ],
    output: Output = Path("patterns"),
    prefix: Annotated[
        str | None,
        typer.Option(help="Start of the file names; the model's name.", show_default=False),
    ] = None,
    coverage: Annotated[
        float, typer.Option(help="Share of each layer's router weight that kept experts take.")
    ] = 0.9,
    revision: Revision = None,
) -> None:
    """Write one pattern per task, and one of all tasks together, from calibration statistics."""
    from edge_moe.checkpoint import Checkpoint
    from edge_moe.hub import resolve_model
    from edge_moe.stats import ExpertStats
    from edge_moe.task_pattern import GENERAL, make_pattern

    folders = dict(_name_and_folder(text) for text in stats)
    if len(folders) < len(stats) or GENERAL in folders:
        raise InputError(f"--stats names a task twice, or is called {GENERAL!r}: rename one")
    checkpoint = Checkpoint(resolve_model(model, revision))
    found = {name: ExpertStats.load(folder) for name, folder in folders.items()}
    for name, each in found.items():
        if each.info.model_fingerprint != checkpoint.fingerprint:
            raise InputError(f"the statistics of {name!r} belong to another model than {model}")
    output.mkdir(parents=True, exist_ok=True)
    groups = checkpoint.spec.router.num_groups
    for name, parts in [
        *((name, [each]) for name, each in found.items()),
        (GENERAL, [*found.values()]),
    ]:
        pattern = make_pattern(name, parts, coverage, groups)
        path = output / f"{prefix or checkpoint.folder.name}-{name}.json"
        pattern.save(path)
        kept = sum(map(len, pattern.kept))
        every = len(pattern.kept) * pattern.num_experts
        stderr().print(f"{path}: {pattern.num_tokens:,} tokens, {kept} of {every} experts kept")


def _name_and_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise InputError(f"--stats {text!r} is not understood: write NAME=DIR, as in code=stats")
    return name, Path(folder)
