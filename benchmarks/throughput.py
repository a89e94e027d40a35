"""Seconds per billion parameters to calibrate, transform, build and recover, beside their bounds.

    python benchmarks/throughput.py [--model FOLDER] [--windows 4] [--work FOLDER] [--only WORD]

Without --model: the demo model, and a random one whose matrices are larger. With --only: rows with
that word in their names (repeatable), and the other rows of the JSON file stay.

Two bounds are known. One core's rate of float32 matrix products bounds the operations that a job
cannot do without (see `work_bounds.py`); processor seconds are compared to it, whoever else uses
the cores. The disk's rates bound the bytes that a job read and wrote (/proc/self/io); elapsed
seconds are compared to it. The longer bound is shown. Files leave the page cache before every job.
Transforms halve the number of experts, HEAPr their width; they are given the statistics, HEAPr
measures its gradients. Recovery repairs ternary experts on as many tokens of text as the others.
Prints one table and writes benchmarks/results/throughput.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall others

import torch
from machine_rates import direct_read_rate, fsynced_write_rate, matrix_rate
from rich.console import Console
from synthetic import Sizes, synthetic_checkpoint
from throughput_jobs import ROW_NAMES, Bench
from throughput_record import Rates, Throughput, merge, show

from edge_moe.checkpoint import Checkpoint
from edge_moe.demo import demo_model_dir
from edge_moe.errors import InputError
from edge_moe.files import require_free_disk, write_text
from edge_moe.measurement import Provenance, this_machine

RESULTS = Path(__file__).resolve().parent / "results"
WIDER = Sizes(num_layers=2, hidden_size=1024, expert_width=512, num_experts=8)


def measure(
    models: dict[str, Path], folder: Path, windows: int, is_wanted: Callable[[str], bool]
) -> Throughput:
    """Rates, the wanted jobs on all models, rates again."""
    load = os.getloadavg()[0]
    first = Checkpoint(next(iter(models.values())))
    before = _rates(first, folder)
    costs = []
    for name, model in models.items():
        work = folder / f"work-{name}"
        work.mkdir()
        costs.append(Bench(name, Checkpoint(model), work, windows).costs(is_wanted))
    return Throughput(
        provenance=Provenance.published(),
        load_average=round(load, 2),
        rates=before.better(_rates(first, folder)),
        models=costs,
    )


def _rates(checkpoint: Checkpoint, folder: Path) -> Rates:
    return Rates(
        matrix_flops_per_second=matrix_rate(),
        read_bytes_per_second=direct_read_rate(checkpoint),
        write_bytes_per_second=fsynced_write_rate(folder),
    )


def chosen_rows(words: Sequence[str] | None) -> tuple[str, ...]:
    """Rows whose name has one of `words`; all without any.

    Raises:
        InputError: a word that no row has.
    """
    for word in words or ():
        if not any(word in name for name in ROW_NAMES):
            raise InputError(f"no row has {word!r} in its name; rows are {'; '.join(ROW_NAMES)}")
    return tuple(n for n in ROW_NAMES if not words or any(word in n for word in words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=None, help="checkpoint folder")
    parser.add_argument("--work", type=Path, default=Path.cwd(), help="folder on the disk to test")
    parser.add_argument("--windows", type=int, default=4, help="calibration windows of 512 tokens")
    parser.add_argument("--only", action="append", help="word in the rows' names; repeatable")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    arguments = parser.parse_args()
    path = arguments.output / "throughput.json"
    try:
        rows = chosen_rows(arguments.only)
        known = Throughput.load(path) if arguments.only and path.exists() else None
        if known is not None:
            known.require_machine(this_machine())
    except InputError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    require_free_disk(arguments.work, 2 * 10**9, "the throughput benchmark")
    with tempfile.TemporaryDirectory(prefix="edge-moe-", dir=arguments.work) as name:
        folder = Path(name)
        if arguments.model is not None:
            models = {arguments.model.resolve().name: arguments.model}
        else:
            models = {
                "demo": demo_model_dir(),
                "random, wider": synthetic_checkpoint(folder / "wider", WIDER),
            }
        found = measure(models, folder, arguments.windows, lambda name: name in rows)
    if known is not None:
        try:
            found = merge(known, found, ROW_NAMES)
        except InputError as error:
            show(found, Console(width=150))
            parser.error(str(error))
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_text(path, found.model_dump_json(indent=1) + "\n")
    show(found, Console(width=150))


if __name__ == "__main__":
    main()
