"""`edge-moe demo`: the whole loop on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_moe.commands.options import Budget


def demo_command(
    task: Annotated[str, typer.Option(help="Which shipped task to shrink for.")] = "code",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to work in; a stopped demo goes on.")
    ] = Path("edge-moe-demo"),
    budget: Budget = None,
) -> None:
    """Calibrate, plan, build, run, evaluate and report on the embedded model, in minutes."""
    from edge_moe.demo.flow import StepError, run_demo

    try:
        run_demo(output, task, budget)
    except StepError as error:
        raise typer.Exit(error.exit_code) from None
