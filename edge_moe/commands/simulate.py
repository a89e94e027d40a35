"""`edge-moe simulate`: what a recorded trace would cost with other slots or a skipping rule."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_moe.commands.options import (
    Budget,
    ContextTokens,
    DeviceName,
    Json,
    RunnableModel,
    Skip,
    SkipCalibrationFile,
    skip_rule,
    stdout,
)
from edge_moe.errors import InputError
from edge_moe.units import format_bytes

if TYPE_CHECKING:
    from edge_moe.measurement import SkippingCost
    from edge_moe.runtime.simulate import Simulation


def simulate_command(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="From `edge-moe run --trace`.")],
    model: RunnableModel,
    slots: Annotated[
        int | None, typer.Option(help="Experts in memory at once.", show_default=False)
    ] = None,
    budget: Budget = None,
    ctx: ContextTokens = None,
    device: Annotated[
        DeviceName, typer.Option(help="Where the budget is meant to hold.")
    ] = DeviceName.CPU,
    skip: Skip = None,
    skip_calibration: SkipCalibrationFile = None,
    json: Json = False,
) -> None:
    """Replay a trace through the runtime's own eviction policy, without weights or torch."""
    from edge_moe.hub import resolve_model

    if (slots is None) == (budget is None):
        raise InputError("simulate needs either --slots N or --budget SIZE: give one of them")
    path = resolve_model(model)
    rule = skip_rule(skip, skip_calibration, path)
    from edge_moe.runtime.allotment import (
        allot,
        context_length,
        dense_parameters,
        open_source,
        open_store,
        session_terms,
        source_fingerprint,
    )
    from edge_moe.runtime.policies import DEFAULT_POLICY
    from edge_moe.runtime.replay import Room
    from edge_moe.runtime.simulate import simulate, traced_sizes
    from edge_moe.runtime.trace import Trace

    recorded, source = Trace.load(trace), open_source(path)
    store = open_store(source)
    sizes = traced_sizes(recorded, store, source_fingerprint(source))
    context = context_length(source.spec, ctx)
    terms = session_terms(source, store, context, device.value, has_budget=budget is not None)
    store.close()
    found = allot(source.spec, sizes, terms, budget, slots)
    rules = [None] if rule is None else [None, rule]
    results = [
        simulate(recorded, sizes, Room.of_slots(found.counts), DEFAULT_POLICY, each)
        for each in rules
    ]
    costs = [
        result.cost(
            dense_parameters=dense_parameters(source),
            expert_parameters=source.spec.expert_weights,
        )
        for result in results
    ]
    if json:
        print(f"[{','.join(map(_as_json, results, costs))}]")
        return
    _print(results, costs)


def _as_json(result: Simulation, cost: SkippingCost) -> str:
    import json

    paging = {
        "hit_rate": result.hit_rate,
        "page_in_bytes_per_token": result.page_in_bytes_per_token,
    }
    return json.dumps(result.model_dump() | paging | cost.model_dump(), indent=1)


def _print(results: list[Simulation], costs: list[SkippingCost]) -> None:
    """One column per rule."""
    from rich.table import Table

    from edge_moe.eval_table import skipping_rows

    first = results[0]
    table = Table(
        title=f"{first.num_tokens} tokens in {first.num_steps} steps, {first.num_slots} slots "
        f"({format_bytes(first.slot_bytes)}), {first.policy}",
        title_justify="left",
    )
    table.add_column("skipping")
    for result in results:
        table.add_column(result.rule, justify="right")
    columns = [
        [*skipping_rows(cost), *_paging_rows(result)]
        for result, cost in zip(results, costs, strict=True)
    ]
    for cells in zip(*columns, strict=True):
        table.add_row(cells[0][0], *(text for _, text in cells))
    stdout().print(table)


def _paging_rows(result: Simulation) -> list[tuple[str, str]]:
    return [
        ("paged in", f"{format_bytes(result.page_in_bytes_per_token)} per token"),
        ("hits", f"{result.hits:,}"),
        ("misses", f"{result.misses:,}"),
        ("resident", f"{result.hit_rate:.1%}"),
    ]
