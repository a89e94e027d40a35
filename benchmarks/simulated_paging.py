"""Does `simulate` foretell what paging costs? Predicted and measured time per token, by turns.

    python benchmarks/paging_model.py --folder /big/disk [--gigabytes 0.3]
    python benchmarks/simulated_paging.py /big/disk/paging.gguf [--tokens 64] [--rounds 3]

Two measurements fix the prediction: everything resident (seconds per token), and a quarter of the
experts with the default policy (seconds more per byte paged in): paging weighs most there, and what
disturbs a measurement least. Every other pair of slots and policy is then foretold from a trace:
base + bytes per token x seconds per byte. All of them run in each round, one after another; medians
over rounds are compared, so that what else the machine does hits all alike. Hits must agree.
The pair that fixed the prediction does not count.

The text is the one that `paging_model.py` wrote beside its model, or tokens drawn at random.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from paging_model import TEXT_NAME
from pydantic import BaseModel, ConfigDict, computed_field
from rich.console import Console
from rich.table import Table

from edge_moe.commands.options import parse_names
from edge_moe.files import write_text
from edge_moe.gguf_model import GgufModel
from edge_moe.measurement import Provenance
from edge_moe.runtime.gguf_session import GgufSession
from edge_moe.runtime.next_use import SoonestNextUse
from edge_moe.runtime.policies import POLICIES, policy_named
from edge_moe.runtime.record_trace import feed
from edge_moe.runtime.simulate import Replay, Simulation
from edge_moe.runtime.trace import Trace
from edge_moe.runtime.traced_model import TracedModel, open_traced

RESULTS = Path(__file__).resolve().parent / "results"
PROMPT_TOKENS = 1
"""A window begins with a token of its own, so that every step is one token."""
CALIBRATED = (0.25, SoonestNextUse.name)
GOAL = 0.15
"""Largest error of a prediction, as a share of what was measured."""


class Pair(BaseModel):
    """One share of experts in memory under one policy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float
    num_slots: int
    policy: str
    hit_rate: float
    page_in_bytes_per_token: float
    hits_agree: bool
    predicted_seconds: float
    measured_seconds: list[float]
    """Per token, one for each round."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def median_seconds(self) -> float:
        """Of the measurements."""
        return statistics.median(self.measured_seconds)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratio(self) -> float:
        """Predicted to measured time."""
        return self.predicted_seconds / self.median_seconds

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fixed_the_prediction(self) -> bool:
        return (self.share, self.policy) == CALIBRATED


class Result(BaseModel):
    """A run of this script."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provenance: Provenance
    model: str
    num_tokens: int
    resident_seconds: list[float]
    """Per token with every expert in memory."""
    seconds_per_byte: float
    pairs: list[Pair]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def num_foretold(self) -> int:
        """Pairs but the one that fixed the prediction."""
        return sum(not pair.fixed_the_prediction for pair in self.pairs)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def num_within_goal(self) -> int:
        """... whose prediction is within 15 % of what was measured."""
        foretold = [pair for pair in self.pairs if not pair.fixed_the_prediction]
        return sum(abs(pair.ratio - 1) <= GOAL for pair in foretold)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--policies", type=parse_names, default=tuple(POLICIES))
    parser.add_argument("--shares", type=parse_shares, default=(0.25, 0.5, 0.75))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=Path, help="token ids, a .npy file")
    parser.add_argument("--output", type=Path, default=RESULTS / "simulated_paging.json")
    options = parser.parse_args()
    keys = [(share, name) for share in options.shares for name in options.policies]
    if CALIBRATED not in keys:
        parser.error(
            f"share {CALIBRATED[0]} under {CALIBRATED[1]} fixes the prediction: leave both in"
        )
    window = tokens(options.model, options.text, options.tokens)
    result = compare(options.model, window, options.rounds, keys)
    write_text(options.output, result.model_dump_json(indent=1))
    show(result)


def parse_shares(text: str) -> tuple[float, ...]:
    """`"0.25,0.5"` -> (0.25, 0.5)"""
    return tuple(float(part) for part in parse_names(text))


def tokens(model: Path, text: Path | None, num_tokens: int) -> list[int]:
    """What every run computes."""
    beside = model.parent / TEXT_NAME
    if text is not None or beside.is_file():
        found: list[int] = np.load(text or beside, allow_pickle=False)[:num_tokens].tolist()
        return found
    generator = np.random.default_rng(0)
    drawn: list[int] = generator.integers(1, GgufModel(model).spec.vocab_size, num_tokens).tolist()
    return drawn


def compare(
    path: Path, window: Sequence[int], rounds: int, keys: Sequence[tuple[float, str]]
) -> Result:
    """Measure all (share, policy) pairs by turns, and foretell them."""
    spec = GgufModel(path).spec
    every = spec.num_experts * spec.num_moe_layers
    trace = record(path, window)
    resident: list[float] = []
    measured: dict[tuple[float, str], list[float]] = {key: [] for key in keys}
    hits: dict[tuple[float, str], int] = {}
    for _ in range(rounds):
        resident.append(measure(path, window, None, SoonestNextUse.name)[0])
        for share, name in keys:
            found, hits[share, name] = measure(path, window, int(share * every), name)
            measured[share, name].append(found)
    model = open_traced(path, "cpu")
    replay = Replay(trace, model.sizes(trace))
    runs = {
        (share, name): foretell(replay, model, trace, int(share * every), name)
        for share, name in keys
    }
    base = statistics.median(resident)
    more = statistics.median(measured[CALIBRATED]) - base
    per_byte = more / runs[CALIBRATED].page_in_bytes_per_token
    pairs = [
        Pair(
            share=share,
            num_slots=int(share * every),
            policy=name,
            hit_rate=run.hit_rate,
            page_in_bytes_per_token=run.page_in_bytes_per_token,
            hits_agree=run.hits == hits[share, name],
            predicted_seconds=base + per_byte * run.page_in_bytes_per_token,
            measured_seconds=measured[share, name],
        )
        for (share, name), run in runs.items()
    ]
    return Result(
        provenance=Provenance.published(),
        model=path.name,
        num_tokens=len(window),
        resident_seconds=resident,
        seconds_per_byte=per_byte,
        pairs=pairs,
    )


def record(path: Path, window: Sequence[int]) -> Trace:
    """What the routers choose; everything resident, and nobody looks at the clock."""
    with GgufSession.open(path, context_tokens=len(window), can_trace=True) as session:
        with session.tracing() as recorder:
            feed(session, [window], PROMPT_TOKENS)
        return recorder.finish(session.trace_info())


def measure(
    path: Path, window: Sequence[int], num_slots: int | None, policy: str
) -> tuple[float, int]:
    """(seconds per token, hits) of one session that reads nothing ahead.

    Its routers are watched also with everything resident, so that runs differ by paging alone.
    """
    with GgufSession.open(
        path,
        context_tokens=len(window),
        num_slots=num_slots,
        prefetch=False,
        can_trace=True,
        policy=policy_named(policy),
    ) as session:
        start = time.perf_counter()
        feed(session, [window], PROMPT_TOKENS)
        seconds = time.perf_counter() - start
        return seconds / len(window), session.statistics().hits


def foretell(
    replay: Replay, model: TracedModel, trace: Trace, num_slots: int, policy: str
) -> Simulation:
    """The replay of one pair."""
    terms = model.terms(trace.num_tokens, has_budget=False)
    room = model.room([list(layer) for layer in replay.sizes], terms, None, num_slots)
    return replay.run(room, policy_named(policy))


def show(result: Result) -> None:
    """One row per pair."""
    table = Table(title=f"{result.model}, {result.num_tokens} tokens")
    for name in ("experts", "policy", "hit rate", "MB/token", "foretold", "measured", "error"):
        table.add_column(name, justify="right")
    for pair in result.pairs:
        table.add_row(
            f"{pair.share:.0%}",
            pair.policy,
            f"{pair.hit_rate:.1%}" + ("" if pair.hits_agree else " (counted otherwise)"),
            f"{pair.page_in_bytes_per_token / 1e6:.1f}",
            f"{pair.predicted_seconds * 1e3:.1f} ms",
            f"{pair.median_seconds * 1e3:.1f} ms",
            "fixed by it" if pair.fixed_the_prediction else f"{pair.ratio - 1:+.0%}",
        )
    console = Console()
    console.print(table)
    base = statistics.median(result.resident_seconds)
    console.print(f"everything resident: {base * 1e3:.1f} ms per token")
    console.print(f"within {GOAL:.0%}: {result.num_within_goal} of {result.num_foretold}")


if __name__ == "__main__":
    main()
