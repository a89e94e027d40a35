"""`edge-moe calibrate`: measure every expert on task text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_moe.commands.options import (
    CalibratedModel,
    Output,
    Revision,
    TargetName,
    Tasks,
    parse_names,
    parse_shard,
    resumable,
    stderr,
)
from edge_moe.errors import InputError
from edge_moe.gguf_split import is_gguf_name

if TYPE_CHECKING:
    from edge_moe.stats import ExpertStats


def calibrate_command(
    model: CalibratedModel,
    task: Tasks,
    output: Output = Path("stats"),
    window_tokens: Annotated[int, typer.Option(help="Tokens per window of text.")] = 512,
    max_windows: Annotated[
        int | None, typer.Option(help="Use at most this many windows.", show_default=False)
    ] = None,
    shard: Annotated[
        str, typer.Option(help="i/N: cover every Nth window, from the ith; merge afterwards.")
    ] = "0/1",
    forms: Annotated[
        str | None,
        typer.Option(
            help="Forms to measure, comma separated; else one per class of bits.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        TargetName | None,
        typer.Option(help="Measure the forms that this target offers.", show_default=False),
    ] = None,
    quantiser: Annotated[
        str | None,
        typer.Option(
            help="How experts are packed, here and by build: gptq_refit (default), nearest, "
            "imatrix (default of a .gguf), weighted, refit, gptq; gptq_refit_all for little text; "
            "with --forms tq1_0 also absmean and lloyd.",
            show_default=False,
        ),
    ] = None,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients", help="Run backwards too: better plans, at about twice the time."
        ),
    ] = False,
    revision: Revision = None,
) -> None:
    """Measure every expert on task text, layer by layer. A killed run resumes by running again.

    A .gguf file runs on llama.cpp, as it is. With --gradients a second pass measures what the
    language-model loss says about every expert; that needs a checkpoint.
    """
    from edge_moe.gradient_stats import GradientStats
    from edge_moe.hub import resolve_model
    from edge_moe.reproduce import command_line
    from edge_moe.stats import require_unfinished

    if not gradients or GradientStats.settings_path(output).exists():
        require_unfinished(output)
    part = parse_shard(shard)
    if forms is not None and target is not None:
        raise InputError("--forms and --target both name forms to measure: give one of them")
    names = parse_names(forms) if forms is not None else None
    folder = resolve_model(model, revision)
    if target is not None:
        names = _offered_forms(folder, target)
    measure = _measurement(folder, gradients, quantiser)
    with resumable():
        stats = measure(
            folder,
            task,
            output,
            window_tokens=window_tokens,
            max_windows=max_windows,
            shard=part,
            forms=names,
            quantiser=quantiser,
        )
    info = stats.info
    console = stderr()
    console.print(
        f"{output}: {info.num_tokens:,} tokens in {len(info.windows)} of {info.num_windows} "
        f"windows, {len(info.moe_layer_ids)} layers x {info.num_experts} experts, "
        f"forms {', '.join(info.forms)}, packed by {info.quantiser}"
        f"{', with loss gradients' if gradients else ''}"
    )
    if part[1] > 1:
        console.print(
            f"next, with every shard: {command_line('stats', 'merge', 'OUT', output)} ..."
        )
        return
    options = ("--target", target.value) if target is not None else ()
    plan = command_line("plan", model, "--stats", output, *options, "--budget", "SIZE")
    console.print(f"next: {plan}")


def _offered_forms(model: Path, target: TargetName) -> tuple[str, ...]:
    """What `target` offers for the experts of `model`, which it can hold."""
    from edge_moe.candidates import candidate_forms
    from edge_moe.converters.target_checks import check_model
    from edge_moe.open_model import open_model

    source = open_model(model)
    check_model(source, target.value)
    return candidate_forms(source.spec, target.value)


def _measurement(model: Path, gradients: bool, quantiser: str | None) -> Callable[..., ExpertStats]:
    """The function that calibrates `model`.

    Raises:
        InputError: gradients of a GGUF file, or packing that `build` could not repeat.
    """
    if not is_gguf_name(model):
        from edge_moe.converters.calibrate import calibrate
        from edge_moe.converters.calibrate_gradients import calibrate_with_gradients

        return calibrate_with_gradients if gradients else calibrate
    if gradients:
        raise InputError(
            f"--gradients: llama.cpp does not run {model} backwards; leave the option out, or "
            "calibrate the Hugging Face checkpoint that the file was made from"
        )
    from edge_moe.converters.calibrate_gguf import calibrate_gguf
    from edge_moe.converters.slice_gguf import can_pack

    if quantiser is not None and not can_pack(quantiser):
        raise InputError(
            f"--quantiser {quantiser} packs by the calibration text, which building from {model} "
            "does not run again: use imatrix or nearest"
        )
    return calibrate_gguf
