"""What never waiting for experts costs in quality and gives in speed, with ternary shadows.

    python benchmarks/shadow.py [--body q8_0] [--shadow tq1_0] [--windows 4] [--rounds 5]

A package of a model is run with 25, 50 and 75 % of its experts' bytes for experts, shadows
included, under each `--stall`. Quality is that of held-out text, token by token, beside the same
package whole in memory. Bodies are read between layers, so those numbers repeat: they are those of
a link that brings what a token missed before the next one. Speed is greedy decoding, modes in turn,
as a ratio to `exact` of the same round: from this machine's disk, and over a link of a stated rate
that is imitated by waiting, one read at a time. Over that link quality is measured as well, as it
comes: bodies are late there. `bounded` may wait for two bodies per token.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall others
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import json

from paged_vs_transformers import PROMPTS
from recovery import one_form_plan
from rich.console import Console
from rich.table import Table

from edge_moe import metrics
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.demo import demo_model_dir
from edge_moe.files import write_text
from edge_moe.formats import expert_bytes
from edge_moe.measurement import Provenance
from edge_moe.metrics import Estimate, TokenScores
from edge_moe.plan import CalibrationOptions, Plan
from edge_moe.runtime.expert_store import PackageStore
from edge_moe.runtime.heldout import text_to_score
from edge_moe.runtime.policy import Key
from edge_moe.runtime.session import Session
from edge_moe.runtime.stalls import Stall, StallOptions
from edge_moe.runtime.tokenizer import load_tokenizer
from edge_moe.tasks import task_windows, windows_fingerprint
from edge_moe.units import format_bytes, parse_bytes

RESULTS = Path(__file__).resolve().parent / "results"
SHARES = (0.25, 0.5, 0.75)
MODES: tuple[Stall, ...] = ("exact", "bounded", "never")
TASKS = ("code", "prose")
WINDOW_TOKENS = 256
CALIBRATION_WINDOWS = 40
BODIES_PER_TOKEN = 2
"""That `bounded` may wait for."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of one expert and its shadow, and how many there are."""

    body: int
    shadow: int
    count: int

    def slots(self, share: float, mode: Stall) -> int:
        """Bodies in memory with `share` of all bodies' bytes."""
        room = share * self.count * self.body
        return int((room - (self.count * self.shadow if mode != "exact" else 0)) // self.body)


@dataclass(frozen=True)
class Quality:
    """Of held-out text, against the package whole in memory."""

    kld: Estimate
    same_top: Estimate
    hit_rate: float
    shadow_share: float


@dataclass(frozen=True)
class Speed:
    """Medians over rounds."""

    tokens_per_second: float
    ratio: float
    """To `exact` of the same round and share."""
    least_ratio: float
    most_ratio: float
    shadow_share: float
    stall_seconds_per_token: float


def main() -> None:
    """Measure quality, then speed; print a table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=None, help="default: the demo model")
    parser.add_argument("--body", default="q8_0")
    parser.add_argument("--shadow", default="tq1_0")
    parser.add_argument("--quantiser", default="gptq_refit", help="of both; default: calibrate's")
    parser.add_argument("--windows", type=int, default=4, help=f"of {WINDOW_TOKENS} tokens, a task")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--link", type=parse_bytes, default=parse_bytes("100MB"), help="a second")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    checkpoint = Checkpoint(arguments.model or demo_model_dir())
    spec = checkpoint.spec
    sizes = Sizes(
        expert_bytes(arguments.body, *spec.expert_shape),
        expert_bytes(arguments.shadow, *spec.expert_shape),
        spec.num_moe_layers * spec.num_experts,
    )
    with tempfile.TemporaryDirectory() as folder:
        plan = packed_for_tasks(checkpoint, arguments.body, arguments.quantiser)
        package = build(plan, Path(folder) / "package", shadow=arguments.shadow)
        rows: list[dict[str, Any]] = [
            {"share": share, "mode": mode, "slots": sizes.slots(share, mode)}
            for share in SHARES
            for mode in MODES
        ]
        text = Text.of(package, arguments.windows)
        found = [quality(package, row, sizes, text) for row in rows]
        with slowed(arguments.link):
            late = [quality(package, row, sizes, text, arguments.link) for row in rows]
        fast = speeds(package, rows, sizes, None, arguments)
        slow = speeds(package, rows, sizes, arguments.link, arguments)
    for place, row in enumerate(rows):
        row |= {"quality": asdict(found[place]), "slow_link_quality": asdict(late[place])}
        row |= {"disk": asdict(fast[place]), "slow_link": asdict(slow[place])}
    path = arguments.output or RESULTS / f"shadow-{arguments.body}-{arguments.shadow}.json"
    settings = {name: str(value) for name, value in vars(arguments).items() if name != "output"}
    settings["model"] = arguments.model.name if arguments.model else "demo model"
    provenance = json.loads(Provenance.published().model_dump_json())
    record = {"provenance": provenance, "settings": settings, "bytes": asdict(sizes), "rows": rows}
    write_text(path, json.dumps(record, indent=1) + "\n")
    Console(width=150).print(table(rows, arguments.link))


def packed_for_tasks(checkpoint: Checkpoint, form: str, quantiser: str) -> Plan:
    """Every expert in `form`, packed by calibration text of the tasks."""
    windows = task_windows(
        TASKS, "calibration", load_tokenizer(checkpoint.folder), WINDOW_TOKENS, CALIBRATION_WINDOWS
    )
    calibration = CalibrationOptions(
        tasks=TASKS,
        window_tokens=WINDOW_TOKENS,
        max_windows=CALIBRATION_WINDOWS,
        forms=(form,),
        quantiser=quantiser,
    )
    changes = {"calibration": calibration, "data_fingerprint": windows_fingerprint(windows)}
    return one_form_plan(checkpoint, form).model_copy(update=changes)


def stall(mode: Stall, sizes: Sizes, rate: int, *, is_repeatable: bool) -> StallOptions:
    """`rate` is what a second reads."""
    if mode != "bounded":
        return StallOptions(mode, is_repeatable=is_repeatable)
    seconds = BODIES_PER_TOKEN * sizes.body / rate
    return StallOptions(mode, seconds, rate, is_repeatable)


@dataclass(frozen=True)
class Text:
    """Held-out windows, and what the package whole in memory makes of them."""

    windows: list[list[int]]
    logits: list[Any]

    @classmethod
    def of(cls, package: Path, num_windows: int) -> Text:
        """`num_windows` of each task."""
        with Session.open(package, context_tokens=WINDOW_TOKENS) as whole:
            windows = [
                list(window)
                for task in TASKS
                for window in text_to_score(
                    package, task, whole.tokenizer, WINDOW_TOKENS, num_windows
                ).windows
            ]
            return cls(windows, [decoded(whole, window) for window in windows])


def quality(
    package: Path, row: dict[str, Any], sizes: Sizes, text: Text, link: int | None = None
) -> Quality:
    """With bodies read between layers, or as they come over `link`."""
    options = stall(row["mode"], sizes, link or 10**8, is_repeatable=link is None)
    with Session.open(package, num_slots=row["slots"], prefetch=False, stall=options) as model:
        parts = [
            metrics.compare_tokens(decoded(model, window), reference, window)
            for window, reference in zip(text.windows, text.logits, strict=True)
        ]
        counted = model.statistics()
    found = metrics.compare(TokenScores.join(parts))
    return Quality(found.mean_kld, found.same_top_p, counted.hit_rate, counted.shadow_share)


def decoded(session: Session, window: Sequence[int]) -> Any:
    """float32 [T, V], every token by itself, as if it were generated."""
    vocab_size = session.model.config.vocab_size
    return session.new_loop().logits(window, vocab_size, chunk_tokens=1)


def speeds(
    package: Path,
    rows: Sequence[dict[str, Any]],
    sizes: Sizes,
    link: int | None,
    arguments: argparse.Namespace,
) -> list[Speed]:
    """One per row; modes of one share take turns."""
    results = []
    for share in SHARES:
        with ExitStack() as stack:
            sessions = []
            for row in [row for row in rows if row["share"] == share]:
                options = stall(row["mode"], sizes, link or 10**9, is_repeatable=False)
                session = Session.open(package, num_slots=row["slots"], stall=options)
                sessions.append(stack.enter_context(session))
            if link is not None:
                stack.enter_context(slowed(link))
            results += in_turn(sessions, arguments.rounds, arguments.tokens)
    return results


def in_turn(sessions: Sequence[Session], rounds: int, num_tokens: int) -> list[Speed]:
    """The first session is what the others are compared with."""
    rates: list[list[float]] = [[] for _ in sessions]
    stalled, tokens = [0.0] * len(sessions), 0
    for number in range(rounds + 1):
        tokens += num_tokens * len(PROMPTS) if number else 0
        for place, session in enumerate(sessions):
            seconds, waited = decode(session, num_tokens)
            if number:  # the first round fills caches
                rates[place].append(num_tokens * len(PROMPTS) / seconds)
                stalled[place] += waited
    results = []
    for place, session in enumerate(sessions):
        ratios = [one / other for one, other in zip(rates[place], rates[0], strict=True)]
        results.append(
            Speed(
                tokens_per_second=statistics.median(rates[place]),
                ratio=statistics.median(ratios),
                least_ratio=min(ratios),
                most_ratio=max(ratios),
                shadow_share=session.statistics().shadow_share,
                stall_seconds_per_token=stalled[place] / tokens,
            )
        )
    return results


def decode(session: Session, num_tokens: int) -> tuple[float, float]:
    """(seconds, of which waiting for experts) of greedy tokens after each prompt, without it."""
    seconds = waited = 0.0
    for text in PROMPTS:
        loop = session.new_loop()
        token = int(loop.prefill(session.prompt_ids(text)).argmax())
        before, start = session.statistics().stall_seconds, time.perf_counter()
        for _ in range(num_tokens):
            token = int(loop.step([token])[-1].argmax())
        seconds += time.perf_counter() - start
        waited += session.statistics().stall_seconds - before
    return seconds, waited


@contextmanager
def slowed(bytes_per_second: int) -> Iterator[None]:
    """Records of packages take at least as long as a link of this rate needs, one by one."""
    read, link = PackageStore.read_into, threading.Lock()

    def wait(self: PackageStore, key: Key, buffer: memoryview) -> None:
        with link:
            start = time.perf_counter()
            read(self, key, buffer)
            left = len(buffer) / bytes_per_second - (time.perf_counter() - start)
            time.sleep(max(0.0, left))

    PackageStore.read_into = wait  # type: ignore[method-assign]
    try:
        yield
    finally:
        PackageStore.read_into = read  # type: ignore[method-assign]


def table(rows: Sequence[dict[str, Any]], link: int) -> Table:
    """For people."""
    shown = Table(title="stall: quality and speed", title_justify="left")
    repeatable = ("KLD", "same top", "resident", "shadows", "tok/s, disk", "x exact")
    slowly = (f"KLD, {format_bytes(link)}/s", "shadows", "tok/s", "x exact")
    for name in ("experts", "stall", "slots", *repeatable, *slowly):
        shown.add_column(name, justify="right")
    for row in rows:
        found, late = row["quality"], row["slow_link_quality"]
        disk, slow = row["disk"], row["slow_link"]
        shown.add_row(
            *(f"{row['share']:.0%}", row["mode"], str(row["slots"])),
            f"{found['kld']['value']:.4f}",
            f"{found['same_top']['value']:.1%}",
            f"{found['hit_rate']:.1%}",
            f"{found['shadow_share']:.1%}",
            *(f"{disk['tokens_per_second']:.0f}", f"{disk['ratio']:.2f}"),
            *(f"{late['kld']['value']:.4f}", f"{late['shadow_share']:.1%}"),
            *(f"{slow['tokens_per_second']:.0f}", f"{slow['ratio']:.2f}"),
        )
    return shown


if __name__ == "__main__":
    main()
