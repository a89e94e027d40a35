"""`edge-moe transform`: a smaller checkpoint of the same architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_moe.commands.options import Revision, SourceModel, Tasks, resumable, stderr
from edge_moe.errors import InputError


def transform_command(
    model: SourceModel,
    task: Tasks,
    method: Annotated[
        str,
        typer.Option(help="prune, naee, dern, m-smoe, sub-moe, ream or heapr.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="New folder to write.", show_default=False)
    ],
    experts: Annotated[
        int | None, typer.Option(help="Experts per layer of the result.", show_default=False)
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help="Inner width of the result's experts (heapr).", show_default=False),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Setting of the method.", show_default=False
        ),
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            help="Statistics of MODEL, if calibrated before: scores come from their tasks.",
            show_default=False,
        ),
    ] = None,
    window_tokens: Annotated[int, typer.Option(help="Tokens per window of text.")] = 512,
    max_windows: Annotated[
        int | None, typer.Option(help="Use at most this many windows.", show_default=False)
    ] = None,
    sample_tokens: Annotated[
        int | None,
        typer.Option(
            help="Run layers on at most this many tokens; else 4096 (naee) or 16384.",
            show_default=False,
        ),
    ] = None,
    revision: Revision = None,
) -> None:
    """Prune, merge or narrow experts: checkpoint in, checkpoint out. A killed run resumes."""
    from edge_moe.hub import resolve_model
    from edge_moe.reproduce import command_line
    from edge_moe.tasks import task_label

    values = dict(parse_setting(text) for text in settings or ())
    folder = resolve_model(model, revision)
    from edge_moe.converters.transform import transform
    from edge_moe.converters.transform_request import TextLimits

    with resumable():
        record = transform(
            folder,
            task,
            output,
            method,
            num_experts=experts,
            expert_width=width,
            settings=values,
            limits=TextLimits(window_tokens, max_windows, sample_tokens),
            stats=stats,
            name=model,
        )
    console = stderr()
    console.print(
        f"{output}: {record.num_experts} of {record.source_num_experts} experts per layer, "
        f"{record.expert_width} of {record.source_expert_width} wide"
    )
    if set(record.tasks) != set(map(task_label, task)):
        console.print(
            f"note: scores come from {stats}, which is of {', '.join(record.tasks)}; the text of "
            "--task was not used"
        )
    for note in record.notes:
        console.print(f"note: {note}")
    tasks = [word for each in task for word in ("--task", each)]
    console.print(f"next: {command_line('eval', output, '--against', model, *tasks)}")


def parse_setting(text: str) -> tuple[str, str]:
    """`"threshold=0.5"` -> ("threshold", "0.5").

    Raises:
        InputError: no `=`, or nothing before it.
    """
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InputError(f"setting {text!r} is not understood: write NAME=VALUE, as threshold=0.5")
    return name, value
