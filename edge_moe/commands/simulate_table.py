"""How `edge-moe simulate` shows what it found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from edge_moe.eval_table import skipping_rows
from edge_moe.units import format_bytes

if TYPE_CHECKING:
    from edge_moe.measurement import SkippingCost
    from edge_moe.profile import DeviceProfile
    from edge_moe.runtime.foresight import ForesightResult
    from edge_moe.runtime.limit import Limit
    from edge_moe.runtime.score_predictors import LayerScore, PredictorScore
    from edge_moe.runtime.simulate import Simulation
    from edge_moe.runtime.timeline import Timeline
    from edge_moe.runtime.trace import Trace
    from edge_moe.runtime.what_if import SizeResult, Split

Skipped = Sequence[tuple["Simulation", "SkippingCost"]]


def as_json(
    trace: Trace,
    results: Sequence[SizeResult],
    skipped: Sequence[Skipped],
    profile: DeviceProfile | None,
) -> str:
    """Everything, the tables' derived numbers included."""
    sizes = [result.model_dump() for result in results]
    for size, result in zip(sizes, results, strict=True):
        if result.limit is not None:
            size["limit"] |= {
                "page_in_seconds": result.limit.page_in_seconds,
                "serial_tokens_per_second": result.limit.serial_tokens_per_second,
                "overlapped_tokens_per_second": result.limit.overlapped_tokens_per_second,
            }
        size["predictors"] = [_scored(score) for score in result.predictors]
    for size, pair in zip(sizes, skipped, strict=False):
        size["skipping"] = [
            each.model_dump()
            | {
                "hit_rate": each.hit_rate,
                "page_in_bytes_per_token": each.page_in_bytes_per_token,
            }
            | cost.model_dump()
            for each, cost in pair
        ]
    document = {
        "num_tokens": trace.num_tokens,
        "num_steps": len(trace.step_tokens),
        "device": profile.label if profile else None,
        "sources": profile.sources if profile else {},
        "sizes": sizes,
    }
    return json.dumps(document, indent=1)


def _scored(score: PredictorScore) -> dict[str, Any]:
    """With recall and precision on misses: in all, and layer by layer."""

    def shares(each: LayerScore) -> dict[str, Any]:
        return each.model_dump() | {"recall": each.recall, "precision": each.precision}

    layers = [shares(layer) for layer in score.layers]
    return {"predictor": score.predictor, **shares(score.total), "layers": layers}


def policy_table(trace: Trace, results: Sequence[SizeResult]) -> Table:
    """One row per size and order of eviction."""
    table = Table(
        title=f"{trace.num_tokens} tokens in {len(trace.step_tokens)} steps", title_justify="left"
    )
    table.add_column("experts in memory")
    table.add_column("evicts by")
    for name in ("hit rate", "of Belady's hits", "paged in per token", "uniform router"):
        table.add_column(name, justify="right")
    for result in results:
        label = (
            f"{result.num_slots} ({result.share_of_experts:.0%}), {format_bytes(result.slot_bytes)}"
        )
        for each in result.policies:
            table.add_row(
                label,
                each.policy,
                f"{each.hit_rate:.1%}",
                f"{each.belady_share:.1%}",
                format_bytes(each.page_in_bytes_per_token),
                f"{each.uniform_hit_rate:.1%}",
            )
            label = ""
        table.add_section()
    return table


def cycle_lines(results: Sequence[SizeResult]) -> Iterator[str]:
    """Where LRU's cliff lies."""
    cycle = format_bytes(results[0].cycle_bytes)
    yield f"token cycle: one token uses experts of {cycle} over all layers"
    for result in results:
        if result.is_below_cycle:
            yield (
                f"{result.num_slots} experts are below it: lru evicts each before its layer comes "
                "again"
            )


def lacking_lines(results: Sequence[SizeResult]) -> Iterator[str]:
    """Predictors that were not scored, and why."""
    for line in results[0].not_scored:
        yield f"not scored: {line}"


def more_tables(result: SizeResult, profile: DeviceProfile | None) -> Iterator[Table]:
    """What was asked for besides: limit, guesses, reading ahead, splits; for the first policy."""
    of = f"{result.num_slots} experts, {result.policies[0].policy}"
    if result.foresight is not None:
        yield _foresight_table(result.foresight, result.policies[0].policy, of)
    if result.limit is not None and profile is not None:
        yield _limit_table(result.limit, f"at best on {profile.label}: {of}")
    if result.predictors:
        yield _predictor_table(result, f"guesses of the next layer's experts: {of}")
    if result.splits:
        best = f"{result.best_context_tokens} tokens cost less than 5 % of the speed"
        yield _split_table(result.splits, f"context or experts: {best}")


def skipping_table(pair: Skipped) -> Table:
    """One column per rule."""
    first = pair[0][0]
    table = Table(
        title=f"{first.num_slots} slots ({format_bytes(first.slot_bytes)}), {first.policy}",
        title_justify="left",
    )
    table.add_column("skipping")
    columns = []
    for result, cost in pair:
        table.add_column(result.rule, justify="right")
        columns.append([*skipping_rows(cost), *_paging_rows(result)])
    for cells in zip(*columns, strict=True):
        table.add_row(cells[0][0], *(text for _, text in cells))
    return table


def _paging_rows(result: Simulation) -> list[tuple[str, str]]:
    return [
        ("paged in", f"{format_bytes(result.page_in_bytes_per_token)} per token"),
        ("hits", f"{result.hits:,}"),
        ("misses", f"{result.misses:,}"),
        ("resident", f"{result.hit_rate:.1%}"),
    ]


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _foresight_table(found: ForesightResult, policy: str, of: str) -> Table:
    table = _table(f"what foreknowledge is worth: {of}", "knows", "hit rate", "of Belady's hits")
    for each in found.seen:
        table.add_row(_known(each.num_steps), f"{each.hit_rate:.1%}", f"{each.belady_share:.1%}")
    table.add_section()
    forgetful = found.forgetful
    table.add_row("every layer's tokens shuffled:", "", "")
    for name, rate in (
        (policy, forgetful.policy),
        ("the most frequent, kept", forgetful.fixed),
        ("Belady's rule", forgetful.belady),
    ):
        share = rate / forgetful.belady if forgetful.belady else 1.0
        table.add_row(f"  {name}", f"{rate:.1%}", f"{share:.1%}")
    return table


def _known(num_steps: int) -> str:
    names = {0: "nothing", 1: "the next token"}
    return names.get(num_steps, f"the next {num_steps} tokens")


def _limit_table(limit: Limit, title: str) -> Table:
    table = _table(title, "per token", "time")
    terms = [
        ("dense weights", limit.dense_seconds),
        ("KV cache, full", limit.kv_seconds),
        ("experts in memory", limit.resident_seconds),
    ]
    if limit.measured_compute_seconds is not None:
        terms = [("computing, measured", limit.measured_compute_seconds)]
    terms += [
        ("host link", limit.link_seconds),
        ("storage", limit.storage_seconds),
        ("launches and waiting", limit.sync_seconds),
    ]
    for name, seconds in terms:
        table.add_row(name, f"{seconds * 1e3:.3f} ms")
    table.add_row("one after another", f"{limit.serial_tokens_per_second:,.1f} tokens/s")
    table.add_row("page-in beside compute", f"{limit.overlapped_tokens_per_second:,.1f} tokens/s")
    return table


def _predictor_table(result: SizeResult, title: str) -> Table:
    """Recall and precision on misses; on a clock, what became of the bytes read ahead."""
    table = _table(title, "guess", "misses found", "guesses right")
    clocks = {each.predictor: each for each in result.timelines}
    for name in _CLOCK_COLUMNS if clocks else ():
        table.add_column(name, justify="right")
    if clocks:
        table.add_row("none", "", "", *_clock_cells(clocks["none"]))
    for score in result.predictors:
        total, clock = score.total, clocks.get(score.predictor)
        cells = [score.predictor, f"{total.recall:.1%}", f"{total.precision:.1%}"]
        table.add_row(*cells, *(_clock_cells(clock) if clock else ()))
    return table


_CLOCK_COLUMNS = ("tokens/s", "stalls", "useful", "late", "wasted", "not admitted")


def _clock_cells(clock: Timeline) -> list[str]:
    return [
        f"{clock.tokens_per_second:,.1f}",
        f"{clock.stall_seconds / clock.seconds if clock.seconds else 0:.1%}",
        format_bytes(clock.useful_bytes),
        format_bytes(clock.late_bytes),
        format_bytes(clock.wasted_bytes),
        f"{clock.rejected:,}",
    ]


def _split_table(splits: Sequence[Split], title: str) -> Table:
    table = _table(
        title, "context", "KV cache", "experts", "hit rate", "paged in per token", "tokens/s"
    )
    for each in splits:
        speed = each.tokens_per_second
        table.add_row(
            f"{each.context_tokens}",
            format_bytes(each.kv_bytes),
            f"{each.num_slots}",
            f"{each.hit_rate:.1%}",
            format_bytes(each.page_in_bytes_per_token),
            "" if speed is None else f"{speed:,.1f}",
        )
    return table
