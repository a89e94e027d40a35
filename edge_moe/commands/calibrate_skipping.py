"""`edge-moe calibrate-skipping`: the medians that `--skip odp` and `--skip naee` compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_moe.commands.options import Output, Revision, SourceModel, Tasks, resumable, stderr


def calibrate_skipping_command(
    model: SourceModel,
    task: Tasks,
    output: Output = Path("skip.json"),
    window_tokens: Annotated[int, typer.Option(help="Tokens per window of text.")] = 512,
    max_windows: Annotated[
        int | None, typer.Option(help="Use at most this many windows.", show_default=False)
    ] = None,
    revision: Revision = None,
) -> None:
    """Measure how much lighter a token's other experts are. A killed run resumes."""
    from edge_moe.hub import resolve_model

    folder = resolve_model(model, revision)
    from edge_moe.converters.calibrate_skipping import calibrate_skipping

    with resumable():
        found = calibrate_skipping(
            folder, task, output, window_tokens=window_tokens, max_windows=max_windows
        )
    low, high = min(found.median_ratios), max(found.median_ratios)
    stderr().print(
        f"{output}: {found.num_tokens:,} tokens, median ratios {low:.3f} to {high:.3f} over "
        f"{len(found.median_ratios)} layers"
    )
    stderr().print(
        f"next: edge-moe eval {model} --against {model} --task ... --skip odp "
        f"--skip-calibration {output}"
    )
