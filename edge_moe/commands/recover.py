"""`edge-moe recover`: repair a shrunken package against its original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_moe.commands.options import Tasks, resumable, stderr
from edge_moe.units import MAX_SEED, parse_bytes

if TYPE_CHECKING:
    from edge_moe.converters.recover import RecoveryReport


def recover_command(
    package: Annotated[
        Path, typer.Argument(metavar="PACKAGE", help="Native package of `edge-moe build`.")
    ],
    against: Annotated[
        str,
        typer.Option(metavar="MODEL", help="The checkpoint it was built from.", show_default=False),
    ],
    task: Tasks,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="New package to write.", show_default=False)
    ],
    routers: Annotated[bool, typer.Option("--router/--no-router", help="Fit routers anew.")] = True,
    branches: Annotated[
        bool, typer.Option(help="Train low-rank branches on the attention outputs.")
    ] = True,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the branches.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 300,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    lm_weight: Annotated[
        float, typer.Option(help="Weight of the next-token loss beside the divergence.")
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Start of the branches, order of the text.")
    ] = 0,
    window_tokens: Annotated[int, typer.Option(help="Tokens per window of text.")] = 256,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Use at most this many windows.", show_default=False)
    ] = None,
    max_memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="Refuse to need more than this, as in 16GB; else what the machine has.",
            show_default=False,
        ),
    ] = None,
    gguf_lora: Annotated[
        bool, typer.Option("--gguf-lora", help="Write adapter.gguf for llama.cpp too.")
    ] = False,
) -> None:
    """Train a few parameters of a shrunken package against its original. Resumes after a kill."""
    from edge_moe.hub import resolve_model

    original = resolve_model(against)
    from edge_moe.converters.recover import recover
    from edge_moe.converters.recover_train import train_settings

    if gguf_lora:
        from edge_moe.converters.export_lora_gguf import require_lora_gguf

        require_lora_gguf(package)
    settings = train_settings(
        rank=rank, steps=steps, learning_rate=learning_rate, lm_weight=lm_weight, seed=seed
    )
    with resumable():
        report = recover(
            package,
            original,
            task,
            output,
            routers=routers,
            branches=branches,
            settings=settings,
            window_tokens=window_tokens,
            max_windows=max_windows,
            max_memory_bytes=max_memory,
        )
    _print_report(report)
    if gguf_lora:
        _export_lora(report, output, original)
    tasks = " ".join(f"--task {name}" for name in task)
    stderr().print(f"next: edge-moe eval {output} --against {against} {tasks}")


def _export_lora(report: RecoveryReport, output: Path, original: Path) -> None:
    """Write adapter.gguf into `output`, where there is something to write."""
    from edge_moe.converters.export_lora_gguf import ADAPTER_GGUF_NAME, export_lora_gguf

    path = output / ADAPTER_GGUF_NAME
    if not report.has_gained:
        stderr().print(f"note: nothing was gained, so there is no {path}")
        return
    stderr().print(f"{export_lora_gguf(output, original, path)}")


def _print_report(report: RecoveryReport) -> None:
    """What changed, on windows of the calibration text that were held out."""
    console = stderr()
    kept = [fit for fit in report.routers if fit.is_kept]
    if report.routers:
        console.print(f"routers: {len(kept)} of {len(report.routers)} fitted anew")
    for fit in kept:
        console.print(
            f"  layer {fit.layer_id}: chooses {fit.overlap_before:.1%} -> {fit.overlap_after:.1%} "
            "of the original's experts"
        )
    first, last = report.row(0), report.row(report.kept_step)
    if first and last:
        console.print(
            f"branches: divergence from the original {first.heldout_divergence:.4f} -> "
            f"{last.heldout_divergence:.4f} nats per token, kept step {last.step}"
        )
        if not report.kept_step:
            console.print("branches: nothing was gained, so none are written")
