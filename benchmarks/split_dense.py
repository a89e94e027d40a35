"""A small dense model taken apart into experts: what is lost, before and after it learns again.

    python benchmarks/split_dense.py --work DIR [--dense-steps 3000] [--steps 200]

Trains the dense model of `upcycle.py` in DIR where it is not there yet, splits its feed-forward
layers, and compares with it on held-out text. Everything resumes. The result is
benchmarks/results/split-NAME.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table
from upcycle import DENSE, arguments_parser, heldout_scores, parsed, write_result

from edge_moe import metrics
from edge_moe.converters.upcycle.split import split_dense
from edge_moe.converters.upcycle.split_record import RECORD_NAME, SplitRecord
from edge_moe.converters.upcycle.split_student import DistilSettings
from edge_moe.converters.upcycle.student import UpcycleSettings
from edge_moe.converters.upcycle.upcycle import upcycle
from edge_moe.converters.window_training import checked_settings
from edge_moe.measurement import Provenance
from edge_moe.metrics import Estimate


class Loss(BaseModel):
    """What one split model lost on one task's held-out text, beside the dense model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ppl_ratio: Estimate
    mean_kld: Estimate
    """Nats per token."""
    same_top_p: Estimate
    """Share of tokens whose most likely one stayed."""

    @classmethod
    def of(cls, scores: metrics.TokenScores) -> Loss:
        compared = metrics.compare(scores)
        return cls(**{name: getattr(compared, name) for name in cls.model_fields})


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
    paths = {DENSE: whole} | {str(steps): folder for steps, folder in folders.items()}
    scores = heldout_scores(paths, tasks, num_windows)
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
        losses={
            steps: {task: Loss.of(found[str(steps)]) for task, found in scores.items()}
            for steps in folders
        },
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
    parser = arguments_parser("Split a small dense model into experts.", dense_steps=3000)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200, help="of learning again")
    parser.add_argument("--max-windows", type=int, default=600, help="windows of text read")
    args = parsed(parser)
    steps = sorted({0, args.steps})
    sizes = {"num_experts": args.experts, "top_k": args.top_k, "max_windows": args.max_windows}
    folders = made(args.dense, args.data, args.work, steps, **sizes)
    result = measure(args.dense, folders, args.work, args.task, args.windows)
    write_result(result, "split", args)
    print_table(result, Console(width=200))


if __name__ == "__main__":
    main()
