"""`edge-moe delta`: a fine-tuned model as a small file beside its base."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_moe.commands.options import Budget, SourceModel, resumable, stderr
from edge_moe.errors import InputError
from edge_moe.units import format_bytes

if TYPE_CHECKING:
    from edge_moe.converters.make_delta import DeltaReport


class ScaleName(StrEnum):
    """Values of `edge_moe.delta_info.ScaleRule` that need no number."""

    L1 = "l1"
    LEAST_SQUARES = "least-squares"


def delta_command(
    base: SourceModel,
    tuned: Annotated[
        str,
        typer.Argument(
            metavar="TUNED",
            help="Folder of a model that was fine-tuned from it, all of its weights there.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write.", show_default=False)
    ],
    density: Annotated[
        float,
        typer.Option(
            help="Share of every tensor's weights whose change is kept, the largest ones; of those "
            "only the sign is."
        ),
    ] = 0.05,
    scale: Annotated[
        ScaleName | None,
        typer.Option(
            help="What a tensor's signs are multiplied by: l1 (default) gives them the L1 norm of "
            "all its changes; least-squares is the mean magnitude of those that are kept, which "
            "is nearest to them, and mostly too small.",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Instead of --scale: so many times the standard deviation of the tensor's "
            "changes, as ComPEFT has it.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="Choose between l1 and values of --alpha on this text: a shipped task, or a "
            ".jsonl or .txt file, a fifth of which is left out. Repeat for several.",
            show_default=False,
        ),
    ] = None,
    budget: Budget = None,
) -> None:
    """Write what TUNED adds to its base, as sparse signs, for `run --delta`. Resumes if killed."""
    from edge_moe.hub import resolve_model

    if task and (alpha is not None or scale is not None):
        raise InputError("--task chooses what --scale and --alpha say: leave it out, or those")
    if alpha is not None and scale is not None:
        raise InputError("--alpha and --scale are two ways to say the same: give one of them")
    if budget is not None and not task:
        raise InputError("--budget is for running the base, which only --task does: leave it out")
    folders = resolve_model(base), resolve_model(tuned)
    from edge_moe.converters.delta_writer import Scaling
    from edge_moe.converters.make_delta import make_delta, peak_bytes

    stderr().print(f"memory for weights: at most {format_bytes(peak_bytes(folders[0]))}")
    scaling = None
    if alpha is not None:
        scaling = Scaling("alpha", alpha)
    elif scale is not None:
        scaling = Scaling(scale.value)
    score = None
    if task:
        from edge_moe.converters.delta_score import text_score

        score = text_score(folders[0], task, budget_bytes=budget)
    with resumable():
        report = make_delta(*folders, output, density=density, scaling=scaling, score=score)
    _print_report(report)
    stderr().print(f"next: edge-moe run {base} --delta {output}")


def _print_report(report: DeltaReport) -> None:
    console = stderr()
    share = report.num_kept / report.num_weights
    console.print(
        f"{report.path}: {format_bytes(report.num_bytes)}, "
        f"{report.base_bytes / report.num_bytes:.1f} times smaller than the model; "
        f"{report.num_kept} of {report.num_weights} weights change ({share:.2%})"
    )
    bound = 8 * report.entropy_bytes / report.num_weights
    console.print(
        f"{report.bits_per_weight:.4f} bits per weight, of which the entropy of such signs at "
        f"random places is {bound:.4f}"
    )
    scaling = report.scaling
    name = scaling.rule if scaling.alpha is None else f"alpha {scaling.alpha:g}"
    console.print(f"scales: {name}; {report.explained:.1%} of the squared change lies in the signs")
