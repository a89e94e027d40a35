"""How often does a prompt find the pattern of its own task? Every held-out text of every task.

    python benchmarks/task_retrieval.py [--tokens 32 --tokens 64] [--texts 50]

A prompt is the first tokens of a held-out text. Prints, per prompt length, the confusion matrix of
`run --task auto` (which falls back to the general pattern in doubt), the accuracy of the nearest
pattern without that fallback, by all layers and by the first one as PreMoe's released code does,
and how often a prompt of a task that has no pattern falls back: each task once left out, of the
general pattern too. Writes benchmarks/results/task_retrieval.json. One prefill per text.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from edge_moe.demo import demo_model_dir, task_names
from edge_moe.files import write_text
from edge_moe.measurement import Provenance
from edge_moe.metrics import mean_and_error
from edge_moe.profiles import load_patterns
from edge_moe.runtime.evaluate import progress
from edge_moe.runtime.session import Session
from edge_moe.runtime.torch_decoder import Decoder
from edge_moe.runtime.trace import Trace
from edge_moe.task_pattern import FLOOR, GENERAL, MARGIN, TaskPattern, cosine, match_pattern
from edge_moe.tasks import load_task_texts

RESULTS = Path(__file__).resolve().parent / "results" / "task_retrieval.json"
FloatArray64 = npt.NDArray[np.float64]
Distance = Callable[[FloatArray64, FloatArray64], float]


class Retrieval(BaseModel):
    """What was found with prompts of one length."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_tokens: int
    num_prompts: int
    confusion: dict[str, dict[str, int]]
    """True task -> what `run --task auto` chooses -> prompts."""
    right: float
    wrong: float
    fallback: float
    """Shares of prompts that got their task, another task, or the general pattern."""
    right_error: float
    nearest_all_layers: float
    """Accuracy of the nearest task pattern, the general one and the margin left aside."""
    nearest_first_layer: float
    nearest_first_layer_l2: float
    """First layer and L2 distance, as PreMoe's released code does, on router weights."""
    unknown_fallback: float
    """Share of prompts that fall back when their own task has no pattern."""
    unknown_fallback_by_task: dict[str, float]


class TaskRetrieval(BaseModel):
    """benchmarks/results/task_retrieval.json"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provenance: Provenance
    margin: float
    floor: float
    results: list[Retrieval]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, action="append", help="prompt length; repeatable")
    parser.add_argument("--texts", type=int, default=None, help="at most this many per task")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    lengths = arguments.tokens or [32, 64]
    with Session.open(demo_model_dir()) as session:
        patterns = load_patterns(session.fingerprint)
        traces = trace_prompts(session, max(lengths), arguments.texts)
        num_experts = session.spec.num_experts
    results = []
    for length in lengths:
        queries = [(task, first_tokens(each, length, num_experts)) for task, each in traces]
        results.append(measure(queries, patterns, length))
    found = TaskRetrieval(
        provenance=Provenance.published(), margin=MARGIN, floor=FLOOR, results=results
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output, found.model_dump_json(indent=1) + "\n")
    show(found, Console(width=120))


def trace_prompts(
    session: Session, num_tokens: int, max_texts: int | None
) -> list[tuple[str, Trace]]:
    """(task, what the routers chose) for the start of every held-out text."""
    texts = [
        (task, text)
        for task in task_names()
        for text in load_task_texts(task, "heldout")[:max_texts]
    ]
    found = []
    with progress("prompts", len(texts)) as advance:
        for task, text in texts:
            ids = session.tokenizer.encode(text, add_special_tokens=False)[:num_tokens]
            with session.tracing() as recorder:
                Decoder(session.model, session.device, session.context_tokens).prefill(ids)
            found.append((task, recorder.finish(session.trace_info())))
            advance()
    return found


def first_tokens(trace: Trace, num_tokens: int, num_experts: int) -> FloatArray64:
    """[L, E] mean weights of the first tokens: a longer prompt does not change how they route."""
    count = min(num_tokens, trace.num_tokens)
    part = Trace(
        trace.info,
        trace.rows[:count],
        trace.weights[:count],
        trace.token_norms[:count],
        np.array([count], np.uint32),
    )
    return part.gate_means(num_experts)


def measure(
    queries: Sequence[tuple[str, FloatArray64]], patterns: Mapping[str, TaskPattern], length: int
) -> Retrieval:
    """Match every prompt in all of the ways."""
    tasks = [name for name in patterns if name != GENERAL]
    confusion = {task: dict.fromkeys([*tasks, GENERAL], 0) for task in tasks}
    for task, query in queries:
        confusion[task][match_pattern(query, patterns).chosen] += 1
    is_right = [match_pattern(query, patterns).chosen == task for task, query in queries]
    right = mean_and_error(is_right)
    fallback = sum(row[GENERAL] for row in confusion.values()) / len(queries)
    unknown = {task: _unknown(task, queries, patterns) for task in tasks}
    counts = {task: sum(1 for each, _ in queries if each == task) for task in tasks}
    return Retrieval(
        prompt_tokens=length,
        num_prompts=len(queries),
        confusion=confusion,
        right=right.value,
        right_error=right.error,
        wrong=1 - right.value - fallback,
        fallback=fallback,
        nearest_all_layers=_nearest(queries, patterns, lambda a, b: -cosine(a, b)),
        nearest_first_layer=_nearest(queries, patterns, lambda a, b: -cosine(a[:1], b[:1])),
        nearest_first_layer_l2=_nearest(
            queries, patterns, lambda a, b: float(np.linalg.norm(a[0] - b[0]))
        ),
        unknown_fallback=sum(unknown[task] * counts[task] for task in tasks) / len(queries),
        unknown_fallback_by_task=unknown,
    )


def _nearest(
    queries: Sequence[tuple[str, FloatArray64]],
    patterns: Mapping[str, TaskPattern],
    distance: Distance,
) -> float:
    vectors = {name: each.weights() for name, each in patterns.items() if name != GENERAL}
    found = [min(vectors, key=lambda name: distance(query, vectors[name])) for _, query in queries]
    return float(np.mean([name == task for name, (task, _) in zip(found, queries, strict=True)]))


def _unknown(
    task: str, queries: Sequence[tuple[str, FloatArray64]], patterns: Mapping[str, TaskPattern]
) -> float:
    """Share of `task`'s prompts that fall back when nothing was measured on that task."""
    known = without_task(task, patterns)
    chosen = [match_pattern(query, known).chosen for each, query in queries if each == task]
    return float(np.mean([name == GENERAL for name in chosen]))


def without_task(task: str, patterns: Mapping[str, TaskPattern]) -> dict[str, TaskPattern]:
    """`patterns` as if nothing had been measured on `task`: it is not in the general one either."""
    others = {name: each for name, each in patterns.items() if name not in (task, GENERAL)}
    total = sum(each.num_tokens for each in others.values())
    weights = sum(
        (each.weights() * each.num_tokens / total for each in others.values()),
        start=np.zeros_like(patterns[GENERAL].weights()),
    )
    unit = float(weights.max()) / 255
    scores = tuple(tuple(row) for row in np.rint(weights / unit).astype(int).tolist())
    general = patterns[GENERAL].model_copy(update={"scores": scores, "unit": unit})
    return {**others, GENERAL: general}


def show(found: TaskRetrieval, console: Console) -> None:
    """One confusion matrix and one line of rates per prompt length."""
    for each in found.results:
        names = [*each.confusion, GENERAL]
        table = Table(title=f"first {each.prompt_tokens} tokens", title_justify="left")
        table.add_column("true task")
        for name in [*names, "unknown: falls back"]:
            table.add_column(name, justify="right")
        for task, row in each.confusion.items():
            unknown = f"{each.unknown_fallback_by_task[task]:.0%}"
            table.add_row(task, *(str(row[name]) if row[name] else "." for name in names), unknown)
        console.print(table)
        console.print(
            f"{each.num_prompts} prompts: right {each.right:.1%} ± {each.right_error:.1%}, "
            f"wrong {each.wrong:.1%}, general {each.fallback:.1%} "
            f"(margin {found.margin:g}, floor {found.floor:g}); "
            f"nearest pattern: all layers {each.nearest_all_layers:.1%}, first layer "
            f"{each.nearest_first_layer:.1%} (L2 {each.nearest_first_layer_l2:.1%}); "
            f"a task without a pattern falls back {each.unknown_fallback:.1%}"
        )
    machine = found.provenance.machine
    console.print(f"{machine.cpu}, {machine.cores} cores")


if __name__ == "__main__":
    main()
