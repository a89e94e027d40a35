"""`edge-moe simulate`: what a recorded trace would cost with other memory, orders and devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_moe.available_memory import available_memory_bytes
from edge_moe.commands.options import (
    ContextTokens,
    Json,
    Revision,
    Skip,
    SkipCalibrationFile,
    skip_rule,
    stdout,
)
from edge_moe.commands.this_device import measured_here
from edge_moe.errors import InputError
from edge_moe.plan import Device
from edge_moe.units import MAX_SEED, parse_bytes

if TYPE_CHECKING:
    from edge_moe.measurement import SkippingCost
    from edge_moe.profile import DeviceProfile
    from edge_moe.runtime.policy import EvictionPolicy
    from edge_moe.runtime.simulate import Simulation
    from edge_moe.runtime.skipping import SkipRule
    from edge_moe.runtime.trace import Trace
    from edge_moe.runtime.traced_model import TracedModel
    from edge_moe.runtime.what_if import SizeResult, WhatIf

THIS = "this"
"""The machine at hand, among devices."""
Size = tuple[int | None, int | None]
"""Budget in bytes, or number of slots."""


Slots = Annotated[
    list[int] | None,
    typer.Option(
        "--slots", help="Experts in memory at once. Repeat for several.", show_default=False
    ),
]
Budgets = Annotated[
    list[int] | None,
    typer.Option(
        "--budget",
        parser=parse_bytes,
        metavar="SIZE",
        help="Hard limit on memory: 12GB, 500MB, 8GiB. Repeat for several.",
        show_default=False,
    ),
]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        metavar="NAME",
        help="Order of eviction: next-use, lru, frequency, pinned; else all. Repeat for several: "
        "the first is used for what is shown of one.",
        show_default=False,
    ),
]
DeviceChoice = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="cpu, cuda, or what adds tokens per second: `this`, the machine at hand, measured "
        "once and remembered; or a data sheet, h200, laptop-16gb, rtx-3060-12gb or rtx-4090-24gb.",
    ),
]
SyncMicroseconds = Annotated[
    float,
    typer.Option("--sync-us", help="Microseconds per MoE layer for launches and waiting.", min=0),
]
Ram = Annotated[
    int | None,
    typer.Option(
        "--ram",
        parser=parse_bytes,
        metavar="SIZE",
        help="With a GPU's data sheet: RAM for experts that are not on the device; else all.",
        show_default=False,
    ),
]
StorageRate = Annotated[
    int | None,
    typer.Option(
        "--storage-rate",
        parser=parse_bytes,
        metavar="SIZE",
        help="Bytes that the disk reads per second, at random; else the data sheet's.",
        show_default=False,
    ),
]


def simulate_command(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="From `edge-moe trace`.")],
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="What was traced: checkpoint folder, native package, .gguf file, or hub id.",
            show_default=False,
        ),
    ],
    slots: Slots = None,
    budget: Budgets = None,
    policy: Policies = None,
    ctx: ContextTokens = None,
    device: DeviceChoice = "cpu",
    sync_us: SyncMicroseconds = 0.0,
    ram: Ram = None,
    storage_rate: StorageRate = None,
    measure_again: Annotated[
        bool, typer.Option("--measure-again", help="With --device this: forget what was measured.")
    ] = False,
    predictors: Annotated[
        bool, typer.Option("--predictors", help="Score guesses of the next layer on misses.")
    ] = False,
    foresight: Annotated[
        bool, typer.Option("--foresight", help="How many tokens must be known to hit as Belady's.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of uniform routers and shuffled tokens.")
    ] = 0,
    skip: Skip = None,
    skip_calibration: SkipCalibrationFile = None,
    json: Json = False,
    revision: Revision = None,
) -> None:
    """Replay a trace through the engines' own eviction policies, without weights or torch."""
    from edge_moe.commands.opening import runnable_path
    from edge_moe.runtime.evaluate import progress
    from edge_moe.runtime.foresight import SEEN_STEPS
    from edge_moe.runtime.trace import Trace
    from edge_moe.runtime.traced_model import open_traced
    from edge_moe.runtime.what_if import Question, WhatIf

    profile, kind = _device(device)
    if ram is not None and (profile is None or profile.device != "cuda"):
        raise InputError("--ram is a tier beside a GPU: name one with --device, such as rtx-3060")
    if measure_again and device != THIS:
        raise InputError("--measure-again is about the machine at hand: add --device this")
    sizes = _sizes(slots, budget, profile, is_here=device == THIS)
    path = runnable_path(model, revision)
    rule = skip_rule(skip, skip_calibration, path)
    orders = _policies(policy)
    recorded, traced = Trace.load(trace), open_traced(path, kind)
    context, compute_seconds = traced.context_length(ctx), None
    if device == THIS:
        profile, compute_seconds = measured_here(path, traced, recorded, again=measure_again)
    what_if = WhatIf(
        Question(
            *(recorded, traced, orders, context, profile, sync_us / 1e6, storage_rate, ram),
            has_predictors=predictors,
            has_budget=bool(budget),
            seed=seed,
            is_here=device == THIS,
            compute_seconds=compute_seconds,
            has_foresight=foresight,
        )
    )
    oracles = len(SEEN_STEPS) if foresight else 0
    with progress("replays", len(sizes) * (len(orders) + 1 + oracles)) as advance:
        results = [what_if.size(*size, advance) for size in sizes]
    skipped = [] if rule is None else _skipped(recorded, traced, what_if, rule, sizes, orders[0])
    _print(recorded, results, skipped, profile, is_json=json)


def _device(name: str) -> tuple[DeviceProfile | None, Device]:
    """(the data sheet that `name` is, what it computes on)"""
    if name in ("cpu", THIS):
        return None, "cpu"
    if name == "cuda":
        return None, "cuda"
    from edge_moe.profiles import load_device

    profile = load_device(name)
    return profile, profile.device


def _sizes(
    slots: list[int] | None,
    budgets: list[int] | None,
    profile: DeviceProfile | None,
    *,
    is_here: bool,
) -> list[Size]:
    """What was asked for; else the whole memory of a data sheet, or what is free here."""
    if slots and budgets:
        from edge_moe.runtime.allotment import require_one_limit

        require_one_limit(budgets[0], slots[0])
    if slots:
        return [(None, each) for each in slots]
    if budgets:
        return [(each, None) for each in budgets]
    if profile is not None:
        return [(profile.memory_bytes, None)]
    available_bytes = available_memory_bytes() if is_here else None
    if available_bytes is not None:
        return [(available_bytes, None)]
    raise InputError("simulate needs either --slots N or --budget SIZE: give one of them")


def _policies(names: list[str] | None) -> list[type[EvictionPolicy]]:
    from edge_moe.runtime.policies import POLICIES, policy_named

    return [policy_named(name) for name in names] if names else list(POLICIES.values())


def _skipped(
    trace: Trace,
    model: TracedModel,
    what_if: WhatIf,
    rule: SkipRule,
    sizes: list[Size],
    policy: type[EvictionPolicy],
) -> list[list[tuple[Simulation, SkippingCost]]]:
    """Per size: without the rule, and with it."""
    from edge_moe.runtime.simulate import Replay

    replays = [what_if.replay, Replay(trace, what_if.replay.sizes, rule)]
    dense, expert = model.dense_parameters, model.spec.expert_weights
    found = []
    for size in sizes:
        room = what_if.room(*size)
        results = [replay.run(room, policy) for replay in replays]
        costs = [each.cost(dense_parameters=dense, expert_parameters=expert) for each in results]
        found.append(list(zip(results, costs, strict=True)))
    return found


def _print(
    trace: Trace,
    results: list[SizeResult],
    skipped: list[list[tuple[Simulation, SkippingCost]]],
    profile: DeviceProfile | None,
    *,
    is_json: bool,
) -> None:
    from edge_moe.commands import simulate_table as tables

    if is_json:
        print(tables.as_json(trace, results, skipped, profile))
        return
    console = stdout()
    console.print(tables.policy_table(trace, results))
    for line in tables.cycle_lines(results):
        console.print(line)
    for result in results:
        for table in tables.more_tables(result, profile):
            console.print(table)
    for line in tables.lacking_lines(results):
        console.print(line)
    for pair in skipped:
        console.print(tables.skipping_table(pair))
