"""`edge-moe plan`: the form of every expert under a byte budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_moe.commands.options import (
    DeviceName,
    Json,
    Model,
    Output,
    Revision,
    TargetName,
    stdout,
)
from edge_moe.units import parse_bytes, parse_tokens


def plan_command(
    model: Model,
    stats: Annotated[
        Path, typer.Option(help="Statistics folder of `edge-moe calibrate`.", show_default=False)
    ],
    budget: Annotated[
        int,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="Hard limit on the memory of the running model: 12GB, 500MB, 8GiB.",
            show_default=False,
        ),
    ],
    ctx: Annotated[
        int,
        typer.Option(
            parser=parse_tokens,
            metavar="TOKENS",
            help="Context length to reserve: 8k or 8192; capped to the model's own.",
        ),
    ] = "4k",  # type: ignore[assignment]  # parsed like the user's text
    target: Annotated[TargetName, typer.Option(help="What will be built.")] = TargetName.NATIVE,
    device: Annotated[DeviceName, typer.Option(help="Where it will run.")] = DeviceName.CPU,
    output: Output = Path("plan.json"),
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Choose the form of every expert under a budget; exit 3 with the smallest one that can be met.

    Prints the bytes by term, the frontier (quality against size), other ways to spend the same
    bytes, and what the target cannot express.
    """
    from edge_moe.checkpoint import Checkpoint
    from edge_moe.hub import is_hub_id, resolve_model
    from edge_moe.overhead import runtime_overhead
    from edge_moe.plan_table import print_plan, summarise_plan
    from edge_moe.planner import make_plan
    from edge_moe.stats import ExpertStats

    found_stats = ExpertStats.load(stats)
    folder = resolve_model(model, revision)
    checkpoint = Checkpoint(folder)
    is_measured = target in (TargetName.NATIVE, TargetName.HF)  # llama.cpp's is a constant
    runtime = runtime_overhead(checkpoint.spec.model_type, device.value) if is_measured else None
    plan = make_plan(
        checkpoint,
        found_stats,
        budget,
        model=model if is_hub_id(model) else str(folder.resolve()),
        context_tokens=ctx,
        target=target.value,
        device=device.value,
        runtime=runtime or (0, "assumed"),
    )
    plan.save(output)
    if json:
        print(summarise_plan(plan, output).model_dump_json(indent=1))
        return
    print_plan(plan, output, stdout())
