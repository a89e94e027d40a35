"""`edge-moe fit-pre-gate`: one small network that chooses the experts of all layers ahead."""

from __future__ import annotations

from typing import Annotated

import typer

from edge_moe.commands.fit_guesses import FittedModel, open_fittable
from edge_moe.commands.opening import CommonOptions
from edge_moe.commands.options import (
    Budget,
    NumSlots,
    Revision,
    SafetensorsOutput,
    Tasks,
    TextWindowTokens,
    stderr,
)
from edge_moe.units import MAX_SEED, parse_bytes


def fit_pre_gate_command(
    model: FittedModel,
    task: Tasks,
    output: SafetensorsOutput,
    window_tokens: TextWindowTokens = 256,
    max_windows: Annotated[
        int, typer.Option(help="Sequences in all, of all tasks by turns; an eighth judges.")
    ] = 256,
    width: Annotated[int, typer.Option(help="Of the network's hidden layer.")] = 512,
    epochs: Annotated[int, typer.Option(help="Passes over what the routers chose.")] = 20,
    learning_rate: Annotated[float, typer.Option(help="Adam's, falling to zero.")] = 2e-3,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Of the first weights and the order of tokens.")
    ] = 0,
    memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="For what the routers see and choose; else 2 GB.",
            show_default=False,
        ),
    ] = None,
    budget: Budget = None,
    slots: NumSlots = None,
    revision: Revision = None,
) -> None:
    """Train, on a task's text, what chooses all layers' experts from the first one's input."""
    common = CommonOptions(budget, window_tokens, None)
    with open_fittable(model, revision, output, common, slots) as session:
        from edge_moe.runtime.evaluate import progress
        from edge_moe.runtime.fit_pre_gate import LIMIT_BYTES, PreGateSettings, fit_pre_gate
        from edge_moe.tasks import task_windows

        settings = PreGateSettings(
            width=width, epochs=epochs, learning_rate=learning_rate, seed=seed
        )
        windows = task_windows(task, "calibration", session.tokenizer, window_tokens, max_windows)
        with progress("text, then epochs", len(windows) + epochs) as advance:
            gate = fit_pre_gate(
                *(session, windows, task, settings),
                limit_bytes=memory or LIMIT_BYTES,
                advance=advance,
            )
    gate.save(output)
    stderr().print(f"{output}: {gate.label} (on held-out windows, epoch {gate.info.epochs})")
