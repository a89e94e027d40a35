"""Does `simulate` foretell what paging costs? Predicted and measured time per token, by turns.

    python benchmarks/simulated_paging.py MODEL.gguf [--tokens 64] [--rounds 3]

Two measurements fix the prediction: everything resident (seconds per token), and half of the
experts with the default policy (seconds more per byte paged in). Every other pair of slots and
policy is then foretold from the trace of the resident run: base + bytes per token x seconds per
byte. All of them run in each round, one after another; medians over rounds are compared, so that
what else the machine does hits all alike. Hits must agree exactly.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
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
SHARES = (0.25, 0.5, 0.75)
PROMPT_TOKENS = 1
"""A window begins with a token of its own, so that every step is one token."""
CALIBRATED = (0.5, SoonestNextUse.name)


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

    @property
    def error(self) -> float:
        """Of the prediction, as a share of the median measurement."""
        return self.predicted_seconds / statistics.median(self.measured_seconds) - 1


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--policies", type=parse_names, default=tuple(POLICIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "simulated_paging.json")
    options = parser.parse_args()
    result = compare(options.model, options.tokens, options.rounds, options.policies)
    write_text(options.output, result.model_dump_json(indent=1))
    show(result)


def compare(path: Path, num_tokens: int, rounds: int, policies: Sequence[str]) -> Result:
    """Measure all pairs by turns, and foretell them; `policies` hold the calibrated one."""
    spec = GgufModel(path).spec
    generator = np.random.default_rng(0)
    window = generator.integers(1, spec.vocab_size, num_tokens).tolist()
    every = spec.num_experts * spec.num_moe_layers
    keys = [(share, name) for share in SHARES for name in policies]
    resident: list[float] = []
    measured: dict[tuple[float, str], list[float]] = {key: [] for key in keys}
    hits: dict[tuple[float, str], int] = {}
    for _ in range(rounds):
        seconds, trace, _ = measure(path, window, None, SoonestNextUse.name)
        resident.append(seconds)
        for share, name in keys:
            found, _, hits[share, name] = measure(path, window, int(share * every), name)
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
        provenance=Provenance.here(),
        model=path.name,
        num_tokens=num_tokens,
        resident_seconds=resident,
        seconds_per_byte=per_byte,
        pairs=pairs,
    )


def measure(
    path: Path, window: Sequence[int], num_slots: int | None, policy: str
) -> tuple[float, Trace, int]:
    """(seconds per token, trace, hits) of one session that reads nothing ahead."""
    with GgufSession.open(
        path,
        context_tokens=len(window),
        num_slots=num_slots,
        prefetch=False,
        can_trace=True,
        policy=policy_named(policy),
    ) as session:
        with session.tracing() as recorder:
            start = time.perf_counter()
            feed(session, [window], PROMPT_TOKENS)
            seconds = time.perf_counter() - start
        trace = recorder.finish(session.trace_info())
        return seconds / len(window), trace, session.statistics().hits


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
            f"{statistics.median(pair.measured_seconds) * 1e3:.1f} ms",
            f"{pair.error:+.0%}",
        )
    console = Console()
    console.print(table)
    base = statistics.median(result.resident_seconds)
    console.print(f"everything resident: {base * 1e3:.1f} ms per token")


if __name__ == "__main__":
    main()
