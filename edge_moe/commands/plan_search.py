"""What `edge-moe plan` measures plans with while it searches, where anything can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_moe.commands.options import stderr
from edge_moe.errors import BudgetError, DiskSpaceError, MissingExtraError, StatsError
from edge_moe.gguf_model import GgufModel
from edge_moe.trials import Measuring, OnShare

if TYPE_CHECKING:
    from edge_moe.checkpoint import Checkpoint
    from edge_moe.converters.gguf_measure import GgufPlanMeasure
    from edge_moe.converters.plan_measure import PlanMeasure
    from edge_moe.plan import SearchRecord
    from edge_moe.stats import StatsInfo


@dataclass(frozen=True)
class Searching:
    """A search's arguments for `make_plan`."""

    measure: PlanMeasure | GgufPlanMeasure | None
    """None where plans are not measured."""
    measuring: Measuring | None
    on_share: OnShare

    def described(self, record: SearchRecord) -> SearchRecord:
        """`record` with the text that was measured on."""
        return record if self.measure is None else self.measure.described(record)


@contextmanager
def searching(
    source: Checkpoint | GgufModel,
    stats: Path,
    info: StatsInfo,
    tasks: list[str] | None,
    output: Path,
    *,
    is_wanted: bool,
) -> Iterator[Searching]:
    """What measures plans on `tasks`, or on the text of the statistics; shows the time that passed.

    Plans of a GGUF file are written beside `output` while they are measured.
    """
    with ExitStack() as stack:
        opened = None
        if is_wanted:
            known = tasks or _known_tasks(info)
            opened = _open_measure(source, stats, info, known, output, stack)
        measure, measuring = opened or (None, None)
        on_share = stack.enter_context(_search_bar(shown=measure is not None))
        yield Searching(measure, measuring, on_share)


def _open_measure(
    source: Checkpoint | GgufModel,
    stats: Path,
    info: StatsInfo,
    tasks: list[str],
    output: Path,
    stack: ExitStack,
) -> tuple[PlanMeasure | GgufPlanMeasure, Measuring] | None:
    """What measures plans on `tasks`, and what it can do; None, said aloud, where nothing can."""
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
