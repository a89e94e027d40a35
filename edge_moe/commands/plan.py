"""`edge-moe plan`: the form of every expert under a byte budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_moe.commands.options import (
    DEFAULT_SEARCH_SECONDS,
    CalibratedModel,
    DeviceName,
    Json,
    Output,
    Revision,
    SearchSeconds,
    Shadow,
    TargetName,
    stderr,
    stdout,
)
from edge_moe.errors import InputError
from edge_moe.units import parse_bytes, parse_tokens

if TYPE_CHECKING:
    from edge_moe.plan import Device, Plan, Source, Target
    from edge_moe.spec import ModelSpec


def plan_command(
    model: CalibratedModel,
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
        int | None,
        typer.Option(
            parser=parse_tokens,
            metavar="TOKENS",
            help="Context length to reserve: 8k or 8192; default 4k, capped to the model's own.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        TargetName | None,
        typer.Option(
            help="What will be built; default: native, or gguf from a .gguf file.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[DeviceName, typer.Option(help="Where it will run.")] = DeviceName.CPU,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="Held-out text to measure plans on; default: the tasks of the statistics.",
            show_default=False,
        ),
    ] = None,
    search: Annotated[
        bool,
        typer.Option(
            help="Measure plans proposed in many ways on held-out text and take the best, or only "
            "solve the plain program."
        ),
    ] = True,
    search_seconds: SearchSeconds = DEFAULT_SEARCH_SECONDS,
    shadow: Shadow = None,
    keep_pruned_as_shadows: Annotated[
        bool,
        typer.Option(
            "--keep-pruned-as-shadows",
            help="Drop no expert: those that would be get the smallest form, and stay in memory as "
            "their own shadows. Needs --shadow.",
        ),
    ] = False,
    output: Output = Path("plan.json"),
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Choose the form of every expert under a budget; exit 3 with the smallest one that can be met.

    Prints the bytes by term, the frontier (quality against size), other ways to spend the same
    bytes, and what the target cannot express. Loss gradients beside the statistics are used.
    """
    from edge_moe.commands.plan_search import searching
    from edge_moe.converters.target_checks import check_model
    from edge_moe.files import require_file_output
    from edge_moe.gradient_stats import load_gradients
    from edge_moe.hub import is_hub_id, resolve_model
    from edge_moe.open_model import open_model
    from edge_moe.planner import make_plan
    from edge_moe.stats import ExpertStats

    require_file_output(output, ".json", makes_folder=True)
    if keep_pruned_as_shadows and shadow is None:
        raise InputError("--keep-pruned-as-shadows needs the form of the shadows: add --shadow")
    found_stats = ExpertStats.load(stats)
    gradients = load_gradients(stats, found_stats.info)
    folder = resolve_model(model, revision)
    source = open_model(folder)
    check_model(source, planned := _planned_target(target, source.spec))
    runtime = _runtime(source.spec, planned, device.value)
    with searching(source, stats, found_stats.info, task, output, is_wanted=search) as found:
        plan = make_plan(
            source,
            found_stats,
            budget,
            model=model if is_hub_id(model) else str(folder.resolve()),
            context_tokens=ctx,
            target=planned,
            device=device.value,
            runtime=runtime,
            gradients=gradients,
            measure=found.measure,
            measuring=found.measuring,
            search_seconds=search_seconds,
            on_share=found.on_share,
            shadow=shadow,
            drops_none=keep_pruned_as_shadows,
        )
    if plan.search is not None:
        plan.search = found.described(plan.search)
    _save(plan, output, stats, is_json=json)


def _save(plan: Plan, output: Path, stats: Path, *, is_json: bool) -> None:
    """Write the plan, and print what it says."""
    from edge_moe.plan_table import print_plan, summarise_plan

    if output.exists():
        stderr().print(f"{output} is replaced")
    plan.save(output)
    if is_json:
        print(summarise_plan(plan, output).model_dump_json(indent=1))
        return
    print_plan(plan, output, stdout(), stats)


def _runtime(spec: ModelSpec, target: Target, device: Device) -> tuple[int, Source]:
    """Bytes of a process with next to no model, measured where edge-moe itself will run it."""
    from edge_moe.budget import PROCESS_TARGETS
    from edge_moe.overhead import runtime_overhead

    if target not in PROCESS_TARGETS:
        return 0, "assumed"
    return runtime_overhead(spec.model_type, device)


def _planned_target(asked: TargetName | None, spec: ModelSpec) -> Target:
    """What was asked for, or what the model is most likely wanted as."""
    if asked is not None:
        return asked.value
    return "gguf" if spec.is_gguf else "native"
