"""A small dense model taken apart into experts: what is lost, before and after it learns again.

    python benchmarks/split_dense.py --work DIR [--dense-steps 3000] [--steps 200]

Trains the dense model of `upcycle.py` in DIR where it is not there yet, splits its feed-forward
layers, and compares with it on held-out text. Everything resumes. The result is
benchmarks/results/split-NAME.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table
from upcycle import RESULTS, WINDOW_TOKENS, trained_dense

from edge_moe import metrics
from edge_moe.converters.upcycle.split import split_dense
from edge_moe.converters.upcycle.split_record import RECORD_NAME, SplitRecord
from edge_moe.converters.upcycle.split_student import DistilSettings
from edge_moe.converters.upcycle.student import UpcycleSettings
from edge_moe.converters.upcycle.upcycle import upcycle
from edge_moe.converters.window_training import checked_settings
from edge_moe.demo import task_names
from edge_moe.demo.corpus import DOMAINS, corpus_path
from edge_moe.files import write_text
from edge_moe.measurement import Provenance
from edge_moe.metrics import Estimate
from edge_moe.runtime.evaluate import open_model, progress, score_windows
from edge_moe.runtime.heldout import heldout_windows
from edge_moe.tasks import task_label


class Loss(BaseModel):
    """What one split model lost on one task's held-out text, beside the dense model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ppl_ratio: Estimate
    mean_kld: Estimate
    """Nats per token."""
    same_top_p: Estimate
    """Share of tokens whose most likely one stayed."""


class SplitResult(BaseModel):
    """Every split by its steps of learning, and how to make it again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provenance: Provenance
    model: str
    num_windows: int
    """Held-out windows per task at most."""
    records: dict[int, SplitRecord]
    losses: dict[int, dict[str, Loss]]


def made(
    dense: Path,
    data: Sequence[str],
    work: Path,
    steps: Sequence[int],
    *,
    num_experts: int,
    top_k: int,
    max_windows: int,
) -> dict[int, Path]:
    """The folder of each split by its steps, made where it is not there yet."""
    folders = {}
    for count in steps:
        sizes = f"{num_experts}-{top_k}-{max_windows}-{count}"
        folders[count] = work / f"split-{dense.stem}-{sizes}"
        if not folders[count].exists():
            split_dense(
                dense,
                data,
                folders[count],
                num_experts=num_experts,
                top_k=top_k,
                distil=checked_settings(DistilSettings, steps=count),
                max_windows=max_windows,
                name=dense.name,
            )
    return folders


def measure(
    dense: Path, folders: dict[int, Path], work: Path, tasks: Sequence[str], num_windows: int
) -> SplitResult:
    """Beside the dense model, which is the one that experts were added to, untrained."""
    whole = work / f"untrained-{dense.stem}"
    if not whole.exists():
        upcycle(dense, [], whole, settings=UpcycleSettings(steps=0), name=dense.name)
    paths = {"dense": whole} | {str(steps): folder for steps, folder in folders.items()}
    opened = {
        name: open_model(path, context_tokens=WINDOW_TOKENS, kernels="exact")
        for name, path in paths.items()
    }
    losses: dict[int, dict[str, Loss]] = {steps: {} for steps in folders}
    for task in tasks:
        windows = heldout_windows(task, opened["dense"].tokenizer, WINDOW_TOKENS, num_windows)
        with progress(task, len(windows)) as advance:
            scores = score_windows(opened, opened["dense"], windows, advance)
        for steps, found in losses.items():
            compared = metrics.compare(scores[str(steps)])
            found[task_label(task)] = Loss(
                **{name: getattr(compared, name) for name in Loss.model_fields}
            )
    for each in opened.values():
        each.close()
    records = {
        steps: SplitRecord.model_validate_json((folder / RECORD_NAME).read_bytes())
        for steps, folder in folders.items()
    }
    return SplitResult(
        provenance=Provenance.published(),
        model=dense.name,
        num_windows=num_windows,
        records={
            steps: each.model_copy(update={"provenance": each.provenance.without_folder()})
            for steps, each in records.items()
        },
        losses=losses,
    )


def print_table(result: SplitResult, console: Console) -> None:
    """A row per task."""
    table = Table(box=box.MARKDOWN)
    table.add_column("held-out text")
    for steps in result.losses:
        for heading in ("perplexity", "divergence", "same top"):
            table.add_column(f"{heading}, {steps} steps")
    for task in next(iter(result.losses.values())):
        found = [losses[task] for losses in result.losses.values()]
        cells = [(f"{x.ppl_ratio}", f"{x.mean_kld}", f"{x.same_top_p}") for x in found]
        table.add_row(task, *(cell for row in cells for cell in row))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Split a small dense model into experts.")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--dense", type=Path, default=None, help="default: trained here")
    parser.add_argument("--dense-steps", type=int, default=3000, help="of that training")
    parser.add_argument("--data", action="append", help="repeatable; default: the demo corpora")
    parser.add_argument("--task", action="append", help="repeatable; default: all shipped tasks")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200, help="of learning again")
    parser.add_argument("--max-windows", type=int, default=600, help="windows of text read")
    parser.add_argument("--windows", type=int, default=48, help="held-out windows per task")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    dense = args.dense or trained_dense(args.work, args.dense_steps)
    data = args.data or [str(corpus_path(args.work, name, "train")) for name in DOMAINS]
    steps = sorted({0, args.steps})
    sizes = {"num_experts": args.experts, "top_k": args.top_k, "max_windows": args.max_windows}
    folders = made(dense, data, args.work, steps, **sizes)
    result = measure(dense, folders, args.work, args.task or task_names(), args.windows)
    args.output.mkdir(parents=True, exist_ok=True)
    text = result.model_dump_json(indent=1).replace(str(args.work), "DIR")
    write_text(args.output / f"split-{dense.stem}.json", text + "\n")
    print_table(result, Console(width=200))


if __name__ == "__main__":
    main()
