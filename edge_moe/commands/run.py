"""`edge-moe run`: generate text within a memory budget, once or as a chat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edge_moe.commands.options import (
    Budget,
    ContextTokens,
    DeviceName,
    Json,
    Model,
    Revision,
)
from edge_moe.units import parse_bytes

if TYPE_CHECKING:
    pass


def run_command(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Option(help="Text to go on from; without it a chat starts.", show_default=False),
    ] = None,
    budget: Budget = None,
    ctx: ContextTokens = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Stop at this text. Repeat for several.", show_default=False),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Go on from the prompt as it is: no chat template.")
    ] = False,
    device: Annotated[
        DeviceName | None, typer.Option(help="[default: cuda if present]", show_default=False)
    ] = None,
    ram: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="Keep experts that are not on the device in this much RAM.",
            show_default=False,
        ),
    ] = None,
    prefetch: Annotated[
        bool, typer.Option("--prefetch/--no-prefetch", help="Guess the next layer's experts.")
    ] = True,
    slots: Annotated[
        int | None,
        typer.Option(help="Experts in memory at once, instead of a budget.", show_default=False),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the measurement inside MODEL, for the report.")
    ] = False,
    json: Json = False,
    revision: Revision = None,
) -> None:
    """Generate text; experts are paged in under a hard budget. Statistics go to stderr."""
    from edge_moe.hub import resolve_model

    path = resolve_model(model, revision)
    del path
