"""`edge-moe compare`: every method at the same bytes, on the same held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_moe.commands.options import (
    DEFAULT_SEARCH_SECONDS,
    Json,
    Revision,
    SearchSeconds,
    SourceModel,
    TargetName,
    Tasks,
    resumable,
    wide_stdout,
)
from edge_moe.errors import InputError

DEFAULT_SHARES = ("75%", "50%", "35%", "25%")


def compare_command(
    model: SourceModel,
    task: Tasks,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder for one JSON file per cell.", show_default=False
        ),
    ],
    share: Annotated[
        list[str] | None,
        typer.Option(
            "--share",
            help="Share of the experts' 16-bit bytes, 50% or 0.5; repeat. "
            f"Default: {', '.join(DEFAULT_SHARES)}.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[TargetName, typer.Option(help="Whose rules all obey.")] = TargetName.NATIVE,
    transforms: Annotated[
        bool, typer.Option(help="Also merge, recombine and narrow experts: slower.")
    ] = True,
    search_seconds: SearchSeconds = DEFAULT_SEARCH_SECONDS,
    windows: Annotated[
        int, typer.Option(min=1, help="Held-out windows of 256 tokens to report on.")
    ] = 24,
    off_task_windows: Annotated[
        int, typer.Option(min=0, help="The same of every other shipped task.")
    ] = 2,
    max_windows: Annotated[
        int | None, typer.Option(help="Calibrate on at most this many windows.", show_default=False)
    ] = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Shrink one model in every known way to the same bytes, and measure all of them.

    Every --task is compared on its own: calibrated on its calibration text, measured on its
    held-out text and on that of the other shipped tasks. A killed run resumes with the next cell.
    """
    from edge_moe.compare.record import Cell, CompareOptions
    from edge_moe.compare.table import print_comparison
    from edge_moe.hub import is_hub_id, resolve_model
    from edge_moe.units import parse_share

    shares = [parse_share(text) for text in share or DEFAULT_SHARES]
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: name a folder for the results")
    folder = resolve_model(model, revision)
    from edge_moe.converters.compare import clear_work, compare
    from edge_moe.converters.compare_transforms import COMPARED

    options = CompareOptions(
        target=target.value,
        search_seconds=search_seconds,
        max_windows=windows,
        off_task_windows=off_task_windows,
        transforms=COMPARED if transforms else (),
        calibration_windows=max_windows,
    )
    label = model if is_hub_id(model) else folder.name
    cells: list[Cell] = []
    with resumable():
        for name in task:
            cells += compare(folder, name, shares, output, options, label)
    clear_work(output)
    if json:
        print(f"[{', '.join(cell.model_dump_json() for cell in cells)}]")
        return
    print_comparison(cells, wide_stdout())
