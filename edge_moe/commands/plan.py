"""`edge-moe plan`: the form of every expert under a byte budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
    TargetName,
    stderr,
    stdout,
)
from edge_moe.errors import BudgetError, DiskSpaceError, MissingExtraError, StatsError
from edge_moe.units import parse_bytes, parse_tokens

if TYPE_CHECKING:
    from edge_moe.checkpoint import Checkpoint
    from edge_moe.converters.gguf_measure import GgufPlanMeasure
    from edge_moe.converters.plan_measure import PlanMeasure
    from edge_moe.gguf_model import GgufModel
    from edge_moe.plan import Target
    from edge_moe.spec import ModelSpec
    from edge_moe.stats import StatsInfo
    from edge_moe.trials import Measuring


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
    output: Output = Path("plan.json"),
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Choose the form of every expert under a budget; exit 3 with the smallest one that can be met.

    Prints the bytes by term, the frontier (quality against size), other ways to spend the same
    bytes, and what the target cannot express. Loss gradients beside the statistics are used.
    """
    from edge_moe.budget import PROCESS_TARGETS
    from edge_moe.converters.target_checks import check_model
    from edge_moe.files import require_file_output
    from edge_moe.gradient_stats import load_gradients
    from edge_moe.hub import is_hub_id, resolve_model
    from edge_moe.open_model import open_model
    from edge_moe.overhead import runtime_overhead
    from edge_moe.plan_table import print_plan, summarise_plan
    from edge_moe.planner import make_plan
    from edge_moe.stats import ExpertStats

    require_file_output(output, ".json")
    found_stats = ExpertStats.load(stats)
    gradients = load_gradients(stats, found_stats.info)
    folder = resolve_model(model, revision)
    source = open_model(folder)
    check_model(source, planned := _planned_target(target, source.spec))
    is_measured = planned in PROCESS_TARGETS
    runtime = runtime_overhead(source.spec.model_type, device.value) if is_measured else None
    with ExitStack() as stack:
        opened = None
        if search:
            tasks = task or _known_tasks(found_stats.info)
            opened = _open_measure(source, stats, found_stats.info, tasks, output, stack)
        measure, measuring = opened or (None, None)
        on_share = stack.enter_context(_search_bar(shown=measure is not None))
        plan = make_plan(
            source,
            found_stats,
            budget,
            model=model if is_hub_id(model) else str(folder.resolve()),
            context_tokens=ctx,
            target=planned,
            device=device.value,
            runtime=runtime or (0, "assumed"),
            gradients=gradients,
            measure=measure,
            measuring=measuring,
            search_seconds=search_seconds,
            on_share=on_share,
        )
    if plan.search is not None and measure is not None:
        plan.search = measure.described(plan.search)
    if output.exists():
        stderr().print(f"{output} is replaced")
    plan.save(output)
    if json:
        print(summarise_plan(plan, output).model_dump_json(indent=1))
        return
    print_plan(plan, output, stdout(), stats)


def _open_measure(
    source: Checkpoint | GgufModel,
    stats: Path,
    info: StatsInfo,
    tasks: list[str],
    output: Path,
    stack: ExitStack,
) -> tuple[PlanMeasure | GgufPlanMeasure, Measuring] | None:
    """What measures plans on `tasks`, and what it can do; None, said aloud, where nothing can."""
    from edge_moe.gguf_model import GgufModel

    if not tasks:
        stderr().print(
            "not searching: the text of the statistics is not where it was; name the text to "
            "measure plans on with --task, or say --no-search"
        )
        return None
    from edge_moe.converters.calibration_memory import state_and_require_memory
    from edge_moe.converters.search_memory import NO_SEARCH

    if not isinstance(source, GgufModel):
        from edge_moe.converters.plan_measure import PlanMeasure
        from edge_moe.trials import Measuring

        measure = PlanMeasure(source, info, tasks)
        state_and_require_memory("measuring plans", measure.memory_terms(), NO_SEARCH)
        return measure, Measuring()
    try:
        return _open_gguf_measure(source, stats, info, tasks, output, stack)
    except (BudgetError, DiskSpaceError, MissingExtraError, StatsError) as error:
        stderr().print(f"not searching: {error}", markup=False)
        return None


def _open_gguf_measure(
    source: GgufModel,
    stats: Path,
    info: StatsInfo,
    tasks: list[str],
    output: Path,
    stack: ExitStack,
) -> tuple[GgufPlanMeasure, Measuring]:
    """As `_open_measure`; plans are written beside `output` while they are measured."""
    from edge_moe.converters.calibration_memory import state_and_require_memory
    from edge_moe.converters.expert_squares import squares_in
    from edge_moe.converters.gguf_measure import MEASURING, GgufPlanMeasure, check_packable
    from edge_moe.converters.search_folder import search_folder
    from edge_moe.converters.search_memory import NO_SEARCH
    from edge_moe.formats.quantise import get_quantiser

    check_packable(info)
    work = stack.enter_context(search_folder(output))
    squares = squares_in(stats, source.spec) if get_quantiser(info.quantiser).needs else None
    if squares is not None:
        squares(source.spec.moe_layer_ids[0], 0, is_down=False)  # missing moments are known now
    measure = GgufPlanMeasure(source, info, tasks, work, squares)
    state_and_require_memory("measuring plans", measure.memory_terms(), NO_SEARCH)
    return measure, MEASURING


def _planned_target(asked: TargetName | None, spec: ModelSpec) -> Target:
    """What was asked for, or what the model is most likely wanted as."""
    if asked is not None:
        return asked.value
    return "gguf" if spec.is_gguf else "native"


def _known_tasks(info: StatsInfo) -> list[str]:
    """The statistics' tasks, if all are shipped or still lie where they were."""
    from edge_moe.demo import task_names

    tasks = list(info.options.tasks if info.options else info.tasks)
    shipped = task_names()
    return tasks if all(task in shipped or Path(task).is_file() for task in tasks) else []


@contextmanager
def _search_bar(*, shown: bool) -> Iterator[Callable[[float], None]]:
    """A bar of the time that has passed; what it gives is told that share."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("measuring plans"), BarColumn(), TimeElapsedColumn()
    console = stderr()
    is_shown = shown and console.is_terminal
    with Progress(*columns, console=console, disable=not is_shown) as progress:
        bar = progress.add_task("", total=1.0)
        yield lambda share: progress.update(bar, completed=share)
