"""`edge-moe run`: generate text within a memory budget, once or as a chat."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from edge_moe.commands.chat import chat, show
from edge_moe.commands.generation import (
    Sampling,
    answer,
    as_prompt,
    ignore,
    measure,
    statistics_lines,
)
from edge_moe.commands.opening import (
    CommonOptions,
    PagingOptions,
    open_runnable,
    runnable_path,
    tracing,
)
from edge_moe.commands.options import (
    Budget,
    ContextTokens,
    Delta,
    Json,
    Kernels,
    LinearMapFile,
    Misses,
    NumSlots,
    PreGateFile,
    Revision,
    RunnableModel,
    Skip,
    SkipCalibrationFile,
    Stall,
    StallSeconds,
    check_delta,
    stall_options,
    stderr,
)
from edge_moe.commands.run_options import (
    GpuLayers,
    Graphs,
    MaxNewTokens,
    PatternsFolder,
    PredictorNames,
    Prefetch,
    PromptText,
    RamBytes,
    Raw,
    Rearranged,
    Record,
    Seed,
    StopTexts,
    TaskName,
    Temperature,
    TopP,
    TraceFile,
    WhereToRun,
)
from edge_moe.commands.task_choice import AUTO, choose_task
from edge_moe.errors import InputError
from edge_moe.files import require_file_output

if TYPE_CHECKING:
    from edge_moe.commands.generation import Runnable
    from edge_moe.measurement import RunMeasurement
    from edge_moe.runtime.gguf_session import GgufSession
    from edge_moe.runtime.session import Session

EXIT_INTERRUPTED = 130


def run_command(
    model: RunnableModel,
    prompt: PromptText = None,
    budget: Budget = None,
    ctx: ContextTokens = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: StopTexts = None,
    raw: Raw = False,
    device: WhereToRun = None,
    ram: RamBytes = None,
    prefetch: Prefetch = None,
    predictor: PredictorNames = None,
    linear_map: LinearMapFile = None,
    pre_gate: PreGateFile = None,
    slots: NumSlots = None,
    task: TaskName = None,
    patterns: PatternsFolder = None,
    graphs: Graphs = None,
    gpu_layers: GpuLayers = None,
    rearranged: Rearranged = False,
    kernels: Kernels = None,
    misses: Misses = None,
    skip: Skip = None,
    skip_calibration: SkipCalibrationFile = None,
    stall: Stall = None,
    stall_seconds: StallSeconds = None,
    trace: TraceFile = None,
    delta: Delta = None,
    record: Record = False,
    json: Json = False,
    revision: Revision = None,
) -> None:
    """Generate text, paging experts in under a hard budget. Statistics go to stderr."""
    _check_prompt(prompt, is_needed=json or record, is_matched=task == AUTO)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, tuple(stop or ()))
    sampling.check()
    check_delta(delta, is_recorded=record)
    if trace is not None:
        require_file_output(trace, ".safetensors")
    path = runnable_path(model, revision)
    common = CommonOptions(budget, ctx, device.value if device else None)
    paging = PagingOptions(
        *(slots, ram, task, patterns, skip, skip_calibration, trace, prefetch),
        kernels.value if kernels else None,
        tuple(predictor or ()),
        linear_map,
        misses.value if misses else None,
        gpu_layers,
        rearranged,
        stall_options(stall, stall_seconds),
        graphs,
        pre_gate,
        delta,
    )
    with _opened(path, common, paging, prompt or "", is_raw=raw) as session:
        if prompt is None:
            chat(session, sampling, is_raw=raw)
            return
        show_piece = ignore if json else show
        text, was_interrupted = answer(
            session, as_prompt(session, prompt, raw), sampling, show_piece
        )
        used_seed = seed if temperature > 0 else None
        measured = measure(session, path, text, budget_bytes=budget, seed=used_seed)
    _print(measured, json)
    if record:
        stderr().print(f"recorded {measured.save(path)}")
    if was_interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


def _check_prompt(prompt: str | None, *, is_needed: bool, is_matched: bool) -> None:
    """Refuse an empty prompt, and none where `--json`, `--record` or `--task auto` want one."""
    if prompt is not None and not prompt.strip():
        raise InputError("--prompt is empty: give it some text, or leave it out for a chat")
    if prompt is None and is_needed:
        raise InputError("--json and --record measure one answer: give a --prompt too")
    if prompt is None and is_matched:
        raise InputError("--task auto matches a prompt: give a --prompt too, or name the task")


@contextmanager
def _opened(
    path: Path, common: CommonOptions, paging: PagingOptions, prompt: str, *, is_raw: bool
) -> Iterator[Runnable]:
    """The model in `path`, its task chosen and its warnings said; traced where that was asked."""
    opened, known = open_runnable(path, common, paging)
    with opened as session, ExitStack() as stack:
        native = None if paging.task is None else _native(session)
        if paging.task is not None and native is not None:
            choose_task(native, paging.task, known, as_prompt(session, prompt, is_raw))
        for warning in session.warnings:
            stderr().print(f"warning: {warning}", style="yellow")
        if paging.trace is not None:
            # `open_runnable` refuses --trace where the routers cannot be watched
            watched = cast("Session | GgufSession", session)
            stack.enter_context(tracing(watched, paging.trace))
        yield session


def _native(session: Runnable) -> Session | None:
    """`session` where edge-moe's own runtime runs it, whose import takes torch."""
    from edge_moe.runtime.session import Session

    return session if isinstance(session, Session) else None


def _print(measured: RunMeasurement, is_json: bool) -> None:
    if is_json:
        print(measured.model_dump_json(indent=1))
        return
    print(flush=True)
    for line in statistics_lines(measured):
        stderr().print(line, style="dim")
