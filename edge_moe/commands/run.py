"""`edge-moe run`: generate text within a memory budget, once or as a chat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from edge_moe.commands.options import (
    Budget,
    ContextTokens,
    DeviceName,
    Json,
    Revision,
    RunnableModel,
    Skip,
    SkipCalibrationFile,
    skip_rule,
    stderr,
)
from edge_moe.commands.task_choice import AUTO, choose_task, known_patterns
from edge_moe.errors import InputError, TargetError
from edge_moe.onnx_folder import is_onnx_folder
from edge_moe.units import parse_bytes

if TYPE_CHECKING:
    from edge_moe.commands.generation import Runnable
    from edge_moe.measurement import RunMeasurement
    from edge_moe.runtime.session import Session
    from edge_moe.task_pattern import TaskPattern

EXIT_INTERRUPTED = 130


def run_command(
    model: RunnableModel,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Message for the chat template, or with --raw text to continue; without it a "
            "chat starts.",
            show_default=False,
        ),
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
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    device: Annotated[
        DeviceName | None,
        typer.Option(
            help="Where to run; else cuda where there is one, an ONNX folder where it was planned "
            "for.",
            show_default=False,
        ),
    ] = None,
    ram: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="With a GPU: RAM for experts that are not on the device.",
            show_default=False,
        ),
    ] = None,
    prefetch: Annotated[
        bool, typer.Option("--prefetch/--no-prefetch", help="Fetch the next layer's experts early.")
    ] = True,
    slots: Annotated[
        int | None,
        typer.Option(help="Experts in memory at once, instead of a budget.", show_default=False),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Load only this task's experts; auto finds the task of the prompt.",
            show_default=False,
        ),
    ] = None,
    patterns: Annotated[
        Path | None,
        typer.Option(help="Folder of task patterns; else the shipped ones.", show_default=False),
    ] = None,
    skip: Skip = None,
    skip_calibration: SkipCalibrationFile = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write down every expert that the router chose, for `edge-moe simulate`.",
            show_default=False,
        ),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the measurement inside MODEL, for the report.")
    ] = False,
    json: Json = False,
    revision: Revision = None,
) -> None:
    """Generate text, paging experts in under a hard budget. Statistics go to stderr."""
    from edge_moe.hub import gguf_inside, resolve_model

    if prompt is not None and not prompt.strip():
        raise InputError("--prompt is empty: give it some text, or leave it out for a chat")
    if prompt is None and (json or record):
        raise InputError("--json and --record measure one answer: give a --prompt too")
    if prompt is None and task == AUTO:
        raise InputError("--task auto matches a prompt: give a --prompt too, or name the task")
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, tuple(stop or ()))
    sampling.check()
    path = gguf_inside(Path(model).expanduser()) or resolve_model(model, revision)
    if path.suffix.lower() == ".gguf":
        raise TargetError(
            f"run cannot load {path}: it runs native packages, Hugging Face and ONNX folders; for "
            f"GGUF use llama.cpp, as in `llama-cli -m {path}`, or build with --target native"
        )
    from edge_moe.runtime.session import Session

    opened: Runnable
    device_name = device.value if device else None
    known: dict[str, TaskPattern] = {}
    if is_onnx_folder(path):
        options = {
            "--slots": slots,
            "--ram": ram,
            "--task": task,
            "--patterns": patterns,
            "--skip": skip,
            "--skip-calibration": skip_calibration,
            "--trace": trace,
        }
        refuse_paging_options(path, options)
        from edge_moe.runtime.onnx_session import OnnxSession

        opened = OnnxSession.open(path, context_tokens=ctx, device=device_name, budget_bytes=budget)
    else:
        known = known_patterns(path, task, patterns)
        opened = Session.open(
            path,
            budget_bytes=budget,
            context_tokens=ctx,
            device=device_name,
            num_slots=slots,
            prefetch=prefetch,
            ram_bytes=ram,
            skip=skip_rule(skip, skip_calibration, path),
            pattern=known.get(task) if task else None,
            match_first=task == AUTO,
        )
    with opened as session, ExitStack() as stack:
        if task is not None and isinstance(session, Session):
            choose_task(session, task, known, as_prompt(session, prompt or "", raw))
        for warning in session.warnings:
            stderr().print(f"warning: {warning}", style="yellow")
        if trace is not None and isinstance(session, Session):
            stack.enter_context(tracing(session, trace))
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


def refuse_paging_options(path: Path, options: Mapping[str, object]) -> None:
    """Raise `TargetError` where an option was given that onnxruntime has nothing for."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise TargetError(
            f"{path} runs in onnxruntime, which neither pages nor skips experts: leave out "
            f"{', '.join(given)}, or build with --target native"
        )


@contextmanager
def tracing(session: Session, path: Path) -> Iterator[None]:
    """Write the routers' choices to `path` when the block ends, however it ends."""
    with session.tracing() as recorder:
        try:
            yield
        finally:
            recorder.finish(session.trace_info()).save(path)


def _print(measured: RunMeasurement, is_json: bool) -> None:
    if is_json:
        print(measured.model_dump_json(indent=1))
        return
    print(flush=True)
    for line in statistics_lines(measured):
        stderr().print(line, style="dim")
