"""`edge-moe eval`: the quality of a model on held-out text, alone or beside a reference."""

from __future__ import annotations

from typing import Annotated

import typer

from edge_moe.commands.opening import load_pre_gate
from edge_moe.commands.options import (
    Budget,
    Delta,
    EvaluatedModel,
    Json,
    Kernels,
    PreGateFile,
    Skip,
    SkipCalibrationFile,
    Stall,
    StallRate,
    StallSeconds,
    Tasks,
    check_delta,
    skip_rule,
    stall_options,
    stderr,
    stdout,
)


def eval_command(
    model: EvaluatedModel,
    task: Tasks,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Reference model to compare with.", show_default=False),
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(help="Score at most this many windows.", show_default=False)
    ] = None,
    window_tokens: Annotated[int, typer.Option(help="Tokens per window of text.")] = 256,
    max_problems: Annotated[
        int, typer.Option(help="Solve at most this many of a task's problems.")
    ] = 100,
    budget: Budget = None,
    kernels: Kernels = None,
    skip: Skip = None,
    skip_calibration: SkipCalibrationFile = None,
    stall: Stall = None,
    stall_seconds: StallSeconds = None,
    stall_rate: StallRate = None,
    pre_gate: PreGateFile = None,
    delta: Delta = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the results inside MODEL, for the report.")
    ] = False,
    json: Json = False,
) -> None:
    """Perplexity, KL divergence, same-top rate and exact match, with error bars, per task."""
    from edge_moe.hub import resolve_model

    check_delta(delta, is_recorded=record)
    tested = resolve_model(model)
    reference = resolve_model(against) if against is not None else None
    rule = skip_rule(skip, skip_calibration, tested)
    waiting = stall_options(stall, stall_seconds, stall_rate, is_repeatable=True)
    from edge_moe.runtime.evaluate import evaluate

    results = evaluate(
        tested,
        reference,
        task,
        max_windows=max_windows,
        window_tokens=window_tokens,
        max_problems=max_problems,
        budget_bytes=budget,
        skip=rule,
        kernels=kernels.value if kernels else None,
        stall=waiting,
        pre_gate=load_pre_gate(pre_gate),
        delta=delta,
    )
    if record:
        folder = tested if tested.is_dir() else tested.parent
        for result in results:
            stderr().print(f"recorded {result.save(folder)}")
    if json:
        print(f"[{','.join(result.model_dump_json(indent=1) for result in results)}]")
        return
    from edge_moe.eval_table import print_eval

    print_eval(results, stdout())
