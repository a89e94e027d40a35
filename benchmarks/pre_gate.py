"""What a pre-gate costs in quality, and what reading ahead for certain gains in waiting.

    python benchmarks/pre_gate.py [--windows 12] [--rounds 5] [--links 100MB,400MB]

A pre-gate is trained on calibration text of every shipped task. Quality is that of held-out text
with it, beside the model as it is. Speed is greedy decoding with 25, 50 and 75 % of the experts in
memory, by turns: nothing read ahead, what the next router guesses, and what the pre-gate decided;
its own choices without reading ahead show what its routing alone does to hits. Experts come from
this machine's disk or page cache, and over links of stated rates that are imitated by waiting, one
read at a time. Ratios are to `nothing` of the same round.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall others
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import json

from recovery import one_form_plan
from rich.console import Console
from rich.table import Table
from shadow import RESULTS, SHARES, Speed, in_turn, slowed

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.demo import demo_model_dir, task_names
from edge_moe.files import write_text
from edge_moe.measurement import EvalResult, Provenance
from edge_moe.runtime.evaluate import evaluate
from edge_moe.runtime.fit_pre_gate import fit_pre_gate
from edge_moe.runtime.pre_gate import PreGate
from edge_moe.runtime.session import Session
from edge_moe.tasks import task_windows
from edge_moe.units import format_bytes, parse_bytes

WINDOW_TOKENS = 256
MODES = ("nothing", "next router", "pre-gate, nothing ahead", "pre-gate")


def main() -> None:
    """Train, measure quality, then speed; print tables, write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=None, help="default: the demo model")
    parser.add_argument("--pre-gate", type=Path, default=None, help="else one is trained")
    parser.add_argument("--train-windows", type=int, default=400, help=f"of {WINDOW_TOKENS} tokens")
    parser.add_argument("--windows", type=int, default=12, help="held out, of every task")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--links", default="100MB,400MB", help="bytes per second, imitated")
    parser.add_argument("--output", type=Path, default=RESULTS / "pre-gate.json")
    arguments = parser.parse_args()
    checkpoint = Checkpoint(arguments.model or demo_model_dir())
    given = arguments.pre_gate
    gate = PreGate.load(given) if given is not None else trained(checkpoint, arguments)
    found = evaluate(
        checkpoint.folder,
        checkpoint.folder,
        task_names(),
        max_windows=arguments.windows,
        max_problems=0,
        pre_gate=gate,
    )
    with tempfile.TemporaryDirectory() as folder:
        package = build(one_form_plan(checkpoint, "bf16"), Path(folder) / "package")
        links = [None, *map(parse_bytes, arguments.links.split(","))]
        num_experts = checkpoint.spec.num_experts * checkpoint.spec.num_moe_layers
        rows = [
            row for link in links for row in speeds(package, gate, num_experts, link, arguments)
        ]
    quality = [quality_row(result) for result in found]
    settings = {name: str(value) for name, value in vars(arguments).items() if name != "output"}
    settings["model"] = arguments.model.name if arguments.model else "demo model"
    record = {
        "provenance": json.loads(Provenance.published().model_dump_json()),
        "settings": settings,
        "pre_gate": gate.info.model_dump(mode="json"),
        "quality": quality,
        "speed": rows,
    }
    write_text(arguments.output, json.dumps(record, indent=1) + "\n")
    for shown in (quality_table(quality, gate), speed_table(rows)):
        Console(width=150).print(shown)


def trained(checkpoint: Checkpoint, arguments: argparse.Namespace) -> PreGate:
    """On calibration text of every task, by turns."""
    with Session.open(checkpoint.folder, context_tokens=WINDOW_TOKENS) as session:
        windows = task_windows(
            *(task_names(), "calibration", session.tokenizer, WINDOW_TOKENS),
            arguments.train_windows,
        )
        return fit_pre_gate(session, windows, task_names())


def speeds(
    package: Path,
    gate: PreGate,
    num_experts: int,
    link: int | None,
    arguments: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """One per share and mode; modes of one share take turns."""
    for share in SHARES:
        slots = int(share * num_experts)
        with ExitStack() as stack:
            sessions = [stack.enter_context(_open(package, mode, slots, gate)) for mode in MODES]
            if link is not None:
                stack.enter_context(slowed(link))
            measured = in_turn(sessions, arguments.rounds, arguments.tokens)
            for mode, session, speed in zip(MODES, sessions, measured, strict=True):
                yield speed_row(link, share, mode, session, speed)


def _open(package: Path, mode: str, slots: int, gate: PreGate) -> Session:
    is_gated = mode.startswith("pre-gate")
    return Session.open(
        package,
        num_slots=slots,
        prefetch=mode in ("next router", "pre-gate"),
        predictors=("router",),
        pre_gate=gate if is_gated else None,
    )


def speed_row(
    link: int | None, share: float, mode: str, session: Session, speed: Speed
) -> dict[str, Any]:
    """Hits and bytes are those of all rounds."""
    statistics = session.statistics()
    return {
        "link_bytes_per_second": link,
        "share": share,
        "mode": mode,
        "hit_rate": statistics.hit_rate,
        "prefetch_useful_bytes": statistics.prefetch_useful_bytes,
        "prefetch_late_bytes": statistics.prefetch_late_bytes,
        "prefetch_wasted_bytes": statistics.prefetch_wasted_bytes,
        **asdict(speed),
    }


def quality_row(result: EvalResult) -> dict[str, Any]:
    """Of one task."""
    assert result.comparison is not None and result.base_perplexity is not None
    return {
        "task": result.task,
        "perplexity": asdict(result.perplexity),
        "base_perplexity": asdict(result.base_perplexity),
        "mean_kld": asdict(result.comparison.mean_kld),
        "same_top": asdict(result.comparison.same_top_p),
    }


def quality_table(rows: Sequence[dict[str, Any]], gate: PreGate) -> Table:
    """For people."""
    shown = Table(title=f"quality; pre-gate {gate.label}", title_justify="left")
    for name in ("task", "perplexity", "with the pre-gate", "mean KLD", "same top"):
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(
            row["task"],
            f"{row['base_perplexity']['value']:.3g}",
            f"{row['perplexity']['value']:.3g}",
            f"{row['mean_kld']['value']:.3f}",
            f"{row['same_top']['value']:.1%}",
        )
    return shown


def speed_table(rows: Sequence[dict[str, Any]]) -> Table:
    """For people."""
    shown = Table(title="decoding", title_justify="left")
    names = ("link", "experts", "read ahead", "in time", "stall / token", "tok/s", "x nothing")
    for name in names:
        shown.add_column(name, justify="right")
    for row in rows:
        link = row["link_bytes_per_second"]
        shown.add_row(
            "disk" if link is None else f"{format_bytes(link)}/s",
            f"{row['share']:.0%}",
            row["mode"],
            f"{row['hit_rate']:.1%}",
            f"{1e3 * row['stall_seconds_per_token']:.2f} ms",
            f"{row['tokens_per_second']:.0f}",
            f"{row['ratio']:.2f} ({row['least_ratio']:.2f} to {row['most_ratio']:.2f})",
        )
    return shown


if __name__ == "__main__":
    main()
