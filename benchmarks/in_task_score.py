"""What is left of a model's score on its task at half of its experts' bytes?

    python benchmarks/in_task_score.py [--task code ...] [--share 0.5] [--model DIR]

Every task: calibrates, plans (without the search), builds a native package, and evaluates it beside
the original on held-out text. The score is the share of problems solved where the task has
problems, and the share of tokens with the same most likely next token elsewhere. Both models solve
the same problems, so the error of what is kept is that of a paired ratio. Prints one table and
writes benchmarks/results/in_task_score-<share>.json.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall others
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from rich import box
from rich.console import Console
from rich.table import Table

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.calibrate import calibrate
from edge_moe.demo import demo_model_dir, task_names
from edge_moe.demo.equal_bytes import plan_for_share
from edge_moe.files import write_text
from edge_moe.measurement import EvalResult, Provenance
from edge_moe.metrics import Estimate
from edge_moe.runtime.evaluate import evaluate

RESULTS = Path(__file__).resolve().parent / "results"


def measure(
    model: Path, task: str, share: float, max_windows: int, max_problems: int
) -> EvalResult:
    """Shrink for `task` to `share` of the experts' 16-bit bytes, and evaluate on it."""
    with TemporaryDirectory(prefix="edge-moe-") as work:
        stats = calibrate(model, [task], Path(work) / "stats")
        plan = plan_for_share(Checkpoint(model), stats, share)
        package = build(plan, Path(work) / "package", model=model)
        found = evaluate(
            package,
            model,
            [task],
            max_windows=max_windows,
            max_problems=max_problems,
            kernels="exact",
        )[0]
    published = {"model": f"{share:.0%}", "against": model.name}
    return found.model_copy(update=published | {"provenance": Provenance.published()})


def print_scores(results: Sequence[EvalResult], console: Console) -> None:
    """One Markdown row per task; every share with its standard error."""
    table = Table(box=box.MARKDOWN)
    for heading in ("task", "score"):
        table.add_column(heading)
    for heading in ("original", "shrunken", "kept"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(result.task, *_score(result))
    console.print(table)


def _score(result: EvalResult) -> tuple[str, str, str, str]:
    """(what is scored, of the original, of the shrunken model, what is kept of it)."""
    solved, base, kept = result.exact_match, result.base_exact_match, result.recovery
    if result.recovery_of == "exact match" and solved and base and kept:
        name = f"problems solved, of {result.num_problems}"
        return name, _percent(base), _percent(solved), f"{kept:.1f} %"
    if result.comparison is None:
        raise ValueError(f"{result.task} was not evaluated beside the original")
    same = _percent(result.comparison.same_top_p)
    return f"same top token, of {result.num_tokens}", "100 %", same, same


def _percent(share: Estimate) -> str:
    return f"{Estimate(100 * share.value, 100 * share.error):.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description="Score on the task, at a share of the bytes.")
    parser.add_argument("--model", type=Path, default=None, help="default: the demo model")
    parser.add_argument("--task", action="append", help="repeatable; default: all shipped ones")
    parser.add_argument("--share", type=float, default=0.5, help="of the experts' 16-bit bytes")
    parser.add_argument("--windows", type=int, default=24, help="held-out windows per task")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args()
    model = (args.model or demo_model_dir()).resolve()
    results = [
        measure(model, task, args.share, args.windows, args.problems)
        for task in args.task or task_names()
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps([result.model_dump(mode="json") for result in results], indent=1)
    write_text(args.output / f"in_task_score-{args.share:g}.json", text + "\n")
    print_scores(results, Console(width=120))


if __name__ == "__main__":
    main()
