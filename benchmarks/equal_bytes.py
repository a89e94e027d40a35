"""Is the plan better than other ways to spend the same bytes? Builds and measures all of them.

    python benchmarks/equal_bytes.py [--task code] [--share 0.5 --share 0.25] [--model DIR]

Prints one table and writes benchmarks/results/equal_bytes-<task>-<share>.json. The quality of each
way is its mean KL divergence from the full model on held-out text, in the task and off it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from edge_moe.converters.calibrate_gradients import calibrate_with_gradients
from edge_moe.demo import demo_model_dir, task_names
from edge_moe.demo.equal_bytes import EqualBytes, equal_bytes, print_equal_bytes
from edge_moe.files import write_text
from edge_moe.gradient_stats import load_gradients

RESULTS = Path(__file__).resolve().parent / "results"
SHARES = (0.5, 0.25, 0.125)


def measure(
    model: Path, task: str, shares: Sequence[float], max_windows: int, output: Path
) -> list[EqualBytes]:
    """Calibrate once, then compare at every share; one file per share."""
    with TemporaryDirectory(prefix="edge-moe-") as work:
        folder = Path(work) / "stats"
        stats = calibrate_with_gradients(model, [task], folder)
        gradients = load_gradients(folder, stats.info)
    found = []
    for share in shares:
        result = equal_bytes(
            model, stats, task, share, gradients=gradients, max_windows=max_windows
        )
        output.mkdir(parents=True, exist_ok=True)
        path = output / f"equal_bytes-{Path(task).stem}-{share:g}.json"
        write_text(path, result.model_dump_json(indent=1) + "\n")
        found.append(result)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ways to spend the same expert bytes.")
    parser.add_argument("--model", type=Path, default=None, help="default: the demo model")
    parser.add_argument(
        "--task",
        action="append",
        help=f"repeatable; default code; one of {', '.join(task_names())}",
    )
    parser.add_argument(
        "--share", type=float, action="append", help="of the experts' 16-bit bytes; repeatable"
    )
    parser.add_argument("--windows", type=int, default=24, help="held-out windows per task")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON files")
    args = parser.parse_args()
    model = args.model or demo_model_dir()
    results = []
    for task in args.task or ["code"]:
        results += measure(model, task, args.share or SHARES, args.windows, args.output)
    machine = results[0].provenance.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    console = Console(width=200)
    print_equal_bytes(results, console)
    console.print(f"{machine.cpu}, {machine.cores} cores, {versions}")


if __name__ == "__main__":
    main()
