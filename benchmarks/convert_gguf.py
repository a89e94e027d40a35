"""How fast a Hugging Face folder becomes a GGUF file, against copying its weights on the same disk.

A random Qwen3-MoE checkpoint in bfloat16 is copied (`shutil.copyfile`, then fsync) and exported in
turn, each from a cold page cache: in its own 16 bits, where bytes only change their place, and
packed to q4_k and q8_0 by numpy. Bytes per second count what is read. The bound of the first is
the copy's rate; packing is bound by numpy's rate of rounding, one core per expert.

    python benchmarks/convert_gguf.py --folder /big/disk [--gigabytes 1] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from slice_gguf import copy, forget, random_stats
from synthetic import Sizes, synthetic_checkpoint

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.export_gguf import export_gguf
from edge_moe.files import write_text
from edge_moe.formats import DROP
from edge_moe.measurement import Provenance
from edge_moe.plan import Plan
from edge_moe.planner import make_plan

SOURCE_FORM, PACKED = "bf16", ("q4_k", "q8_0")
HIDDEN, WIDTH, NUM_EXPERTS = 1024, 512, 64
RESULT = Path(__file__).parent / "results" / "convert_gguf.json"


def make_source(folder: Path, num_bytes: int) -> Path:
    """A checkpoint of about `num_bytes`."""
    layer_bytes = 2 * 3 * NUM_EXPERTS * HIDDEN * WIDTH
    sizes = Sizes(max(1, num_bytes // layer_bytes), HIDDEN, WIDTH, NUM_EXPERTS)
    return synthetic_checkpoint(folder, sizes)


def measure(source: Path, output: Path, rounds: int) -> dict[str, list[float]]:
    """Name -> bytes of the source per second, of every round."""
    checkpoint, weights = Checkpoint(source), source / "model.safetensors"
    spec = checkpoint.spec
    jobs: dict[str, Callable[[], object]] = {"copy": lambda: copy(weights, output)}
    whole = make_plan(
        *(checkpoint, random_stats(checkpoint, (DROP, *PACKED)), 10**15),
        model=str(source),
        target="gguf",
        runtime=(0, "assumed"),
    )
    for form in (SOURCE_FORM, *PACKED):
        plan = whole.with_forms([[form] * spec.num_experts] * spec.num_moe_layers)
        jobs[form] = partial(_export, plan, checkpoint, output)
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, work in jobs.items():
            forget(weights)
            start = time.perf_counter()
            work()
            rates[name].append(weights.stat().st_size / (time.perf_counter() - start))
            output.unlink()
    return rates


def _export(plan: Plan, checkpoint: Checkpoint, output: Path) -> None:
    export_gguf(plan, checkpoint, output)
    with output.open("rb+") as handle:
        os.fsync(handle.fileno())


def summary(rates: dict[str, list[float]], source_bytes: int) -> dict[str, Any]:
    """What is printed and kept."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "source_bytes": source_bytes,
        "bytes_per_second": rates,
        "median_bytes_per_second": medians,
        "ratio_to_copy": {
            name: value / medians["copy"] for name, value in medians.items() if name != "copy"
        },
        "peak_process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = make_source(Path(folder) / "source", int(options.gigabytes * 1e9))
        rates = measure(source, Path(folder) / "out.gguf", options.rounds)
        found = summary(rates, (source / "model.safetensors").stat().st_size)
    for name, value in found["median_bytes_per_second"].items():
        ratio = found["ratio_to_copy"].get(name, 1.0)
        print(f"{name:6} {value / 1e6:8.0f} MB/s  {ratio:.2f} x copy")
    found["provenance"] = Provenance.published().model_dump(mode="json")
    write_text(options.output, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    _main()
