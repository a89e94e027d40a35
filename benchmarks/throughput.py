"""How fast `calibrate` and `build` run, beside the disk that bounds them.

    python benchmarks/throughput.py [--model FOLDER] [--work FOLDER] [--windows N]

Without --model a random checkpoint of about 0.5 GB is made. Its files are read with O_DIRECT to
find the disk's read rate, and leave the page cache before every job, so that each job reads them
from the disk again. What a job really read is taken from /proc/self/io. `parts` is the time that
the job's reading at the disk's rate, its packing in memory on all cores and its writing would take
one after the other.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.calibrate import calibrate
from edge_moe.converters.packing import num_workers
from edge_moe.converters.safetensors_writer import TensorEntry, safetensors_file
from edge_moe.demo import demo_model_dir
from edge_moe.files import require_free_disk
from edge_moe.formats import pack_expert
from edge_moe.measurement import this_machine
from edge_moe.plan import Plan
from edge_moe.planner import make_plan
from edge_moe.stats import ExpertStats
from edge_moe.units import format_bytes

SYNTHETIC = {
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "moe_intermediate_size": 512,
    "num_experts": 40,
    "num_local_experts": 40,
}
BUILD_FORMS = ("bf16", "q4_k", "tq1_0")
TASK = "code"
DIRECT_CHUNK_BYTES = 8 * 2**20
WRITE_SAMPLE_BYTES = 256 * 2**20
PACK_SECONDS = 1.0
TABLE_COLUMNS = 128


@dataclass(frozen=True)
class Measured:
    """One job: what it moved, how long it took, how long its parts alone would take."""

    name: str
    seconds: float
    read_bytes: int
    written_bytes: int
    parts_seconds: float | None
    note: str = ""


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: a random one")
    parser.add_argument("--work", type=Path, default=Path.cwd(), help="folder on the disk to test")
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of 512 tokens")
    arguments = parser.parse_args()
    require_free_disk(arguments.work, 3 * 10**9, "the throughput benchmark")
    with tempfile.TemporaryDirectory(prefix="edge-moe-throughput-", dir=arguments.work) as name:
        folder = Path(name)
        model = arguments.model or synthetic_checkpoint(folder / "model")
        measure(model, folder, arguments.windows)


def measure(model: Path, folder: Path, num_windows: int) -> None:
    """Run every job on `model` and print the table."""
    checkpoint = Checkpoint(model)
    read_rates = [direct_read_rate(checkpoint)]
    write_rate = fsynced_write_rate(folder)
    calibration, stats = measure_calibrate(checkpoint, folder, num_windows)
    plan = make_plan(checkpoint, stats, 10**15, model=str(model), runtime=(0, "assumed"))
    rates = max(read_rates), write_rate
    builds = [measure_build(checkpoint, plan, form, folder, rates) for form in BUILD_FORMS]
    read_rates.append(direct_read_rate(checkpoint))
    print_table(checkpoint, [calibration, *builds], read_rates, write_rate)


def measure_calibrate(
    checkpoint: Checkpoint, folder: Path, num_windows: int
) -> tuple[Measured, ExpertStats]:
    """Calibrate on the demo's `code` task with the default forms."""
    found: list[ExpertStats] = []

    def job() -> None:
        output = folder / "stats"
        found.append(calibrate(checkpoint.folder, [TASK], output, max_windows=num_windows))

    seconds, read_bytes, written_bytes = timed(checkpoint, job)
    info = found[0].info
    tokens = info.num_tokens
    note = f"{tokens / seconds:,.0f} tokens/s over {tokens:,} tokens, {len(info.forms)} forms"
    return Measured("calibrate", seconds, read_bytes, written_bytes, None, note), found[0]


def measure_build(
    checkpoint: Checkpoint, plan: Plan, form: str, folder: Path, rates: tuple[float, float]
) -> Measured:
    """Build a native package with every expert in `form`."""
    forms = [[form] * checkpoint.spec.num_experts for _ in plan.forms]
    output = folder / form
    seconds, read_bytes, written_bytes = timed(
        checkpoint,
        lambda: build(
            plan.with_forms(forms),
            output,
            model=checkpoint.folder,
            target="native",
        ),
    )
    shutil.rmtree(output)
    read_rate, write_rate = rates
    parts_seconds = read_bytes / read_rate + written_bytes / write_rate
    note = "copied"
    if form != "bf16":
        rate = packing_rate(checkpoint, form)
        source_bytes = sum(checkpoint.tensors[name].num_bytes for name in checkpoint.expert_tensors)
        parts_seconds += source_bytes / rate
        note = f"packs {format_bytes(rate)}/s in memory"
    return Measured(f"build {form}", seconds, read_bytes, written_bytes, parts_seconds, note)


def timed(checkpoint: Checkpoint, job: Callable[[], object]) -> tuple[float, int, int]:
    """(seconds, bytes read from disk, bytes written) of `job`, started with a cold page cache."""
    forget(checkpoint)
    before = process_io()
    start = time.perf_counter()
    job()
    seconds = time.perf_counter() - start
    after = process_io()
    return seconds, after[0] - before[0], after[1] - before[1]


def process_io() -> tuple[int, int]:
    """(read, written) bytes that this process has caused on the disk so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    counts = dict(line.split(": ") for line in lines)
    return int(counts["read_bytes"]), int(counts["write_bytes"])


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The safetensors files of a checkpoint."""
    return sorted({info.path.resolve() for info in checkpoint.tensors.values()})


def forget(checkpoint: Checkpoint) -> None:
    """Drop the checkpoint's files from the page cache."""
    for path in weight_files(checkpoint):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def direct_read_rate(checkpoint: Checkpoint) -> float:
    """Bytes per second of reading the weight files past the page cache, one request at a time."""
    buffer = mmap.mmap(-1, DIRECT_CHUNK_BYTES)  # page-aligned, as O_DIRECT needs
    num_bytes = 0
    start = time.perf_counter()
    for path in weight_files(checkpoint):
        with open_direct(path) as descriptor:
            while count := os.readv(descriptor, [buffer]):
                num_bytes += count
    return num_bytes / (time.perf_counter() - start)


@contextmanager
def open_direct(path: Path) -> Iterator[int]:
    """A descriptor that reads past the page cache."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def fsynced_write_rate(folder: Path) -> float:
    """Bytes per second of writing a new file and flushing it to the disk."""
    path = folder / "sample"
    chunk = os.urandom(DIRECT_CHUNK_BYTES)
    start = time.perf_counter()
    with path.open("wb") as handle:
        for _ in range(WRITE_SAMPLE_BYTES // len(chunk)):
            handle.write(chunk)
        handle.flush()
        os.fsync(handle.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return WRITE_SAMPLE_BYTES / seconds


def packing_rate(checkpoint: Checkpoint, form: str) -> float:
    """Source bytes per second of packing one expert over and over, in memory, on all cores."""
    layer_id = checkpoint.spec.moe_layer_ids[0]
    matrices = checkpoint.expert(layer_id, 0)
    source_bytes = sum(info.num_bytes for info in checkpoint.expert_ranges(layer_id, 0))
    workers = num_workers(checkpoint.spec)
    start, count = time.perf_counter(), 0
    with ThreadPoolExecutor(workers) as pool:
        while time.perf_counter() - start < PACK_SECONDS:
            list(pool.map(lambda _: pack_expert(form, *matrices), range(workers)))
            count += workers
    return count * source_bytes / (time.perf_counter() - start)


def print_table(
    checkpoint: Checkpoint, jobs: list[Measured], read_rates: list[float], write_rate: float
) -> None:
    """One table, with the machine and the disk above it."""
    console = Console()
    if console.width < TABLE_COLUMNS:
        console = Console(width=TABLE_COLUMNS)
    bound = max(read_rates)
    for line in describe(checkpoint, read_rates, write_rate):
        console.print(line)
    table = Table("job", "read", "written", "seconds", "read rate", "bound", "of bound", "x parts")
    table.add_column("detail")
    for job in jobs:
        rate = job.read_bytes / job.seconds
        parts = "" if job.parts_seconds is None else f"{job.seconds / job.parts_seconds:.2f}"
        table.add_row(
            job.name,
            format_bytes(job.read_bytes),
            format_bytes(job.written_bytes),
            f"{job.seconds:.2f}",
            f"{format_bytes(rate)}/s",
            f"{job.read_bytes / bound:.2f} s",
            f"{rate / bound:.1%}",
            parts,
            job.note,
        )
    console.print(table)
    console.print("bound: reading the same bytes at the disk's rate; x parts: see the file's top")


def describe(
    checkpoint: Checkpoint, read_rates: list[float], write_rate: float
) -> tuple[str, str, str]:
    """The machine, its disk and the model."""
    machine, spec = this_machine(), checkpoint.spec
    reads = " and ".join(f"{format_bytes(rate)}/s" for rate in read_rates)
    model_bytes = sum(info.num_bytes for info in checkpoint.tensors.values())
    return (
        f"machine: {machine.cpu}, {machine.cores} cores, {format_bytes(machine.ram_bytes)} RAM, "
        f"{machine.os}, load average {os.getloadavg()[0]:.1f}",
        f"disk: reads {reads} (O_DIRECT, before and after), writes {format_bytes(write_rate)}/s",
        f"model: {spec.num_moe_layers} layers x {spec.num_experts} experts of "
        f"{spec.expert_weights * 2 / 1e6:.2f} MB, {format_bytes(model_bytes)} in all",
    )


def synthetic_checkpoint(folder: Path) -> Path:
    """A random checkpoint of the demo's architecture and tokenizer, wider and with more experts."""
    demo = demo_model_dir()
    folder.mkdir()
    for path in demo.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((demo / "config.json").read_text()) | SYNTHETIC
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generator = np.random.default_rng(0)
    entries = list(synthetic_entries(Checkpoint(demo)))
    with safetensors_file(folder / "model.safetensors", entries) as writer:
        for entry in entries:
            writer.write(entry.name, [random_bfloat16(entry.shape, generator)])
    return folder


def synthetic_entries(demo: Checkpoint) -> Iterator[TensorEntry]:
    """The demo's tensors, with its sizes replaced by those of `SYNTHETIC`."""
    hidden, width = SYNTHETIC["hidden_size"], SYNTHETIC["moe_intermediate_size"]
    old_hidden = demo.spec.hidden_size
    num_experts = SYNTHETIC["num_experts"]
    for info in demo.dense_tensors:
        if info.name.startswith("model.layers.") and not info.name.startswith("model.layers.0."):
            continue
        shape = tuple(hidden if size == old_hidden else size for size in info.shape)
        if ".self_attn." in info.name:
            shape = attention_shape(info.name, info.shape, hidden)
        if info.name.endswith(".mlp.gate.weight"):
            shape = (num_experts, hidden)
        for layer_id in range(SYNTHETIC["num_hidden_layers"]):
            name = info.name.replace("layers.0.", f"layers.{layer_id}.")
            if name != info.name or layer_id == 0:
                yield TensorEntry(name, "BF16", shape)
    for layer_id in range(SYNTHETIC["num_hidden_layers"]):
        for expert_id in range(num_experts):
            gate, up, down = demo.spec.expert_tensor_names(layer_id, expert_id)
            yield TensorEntry(gate, "BF16", (width, hidden))
            yield TensorEntry(up, "BF16", (width, hidden))
            yield TensorEntry(down, "BF16", (hidden, width))


def attention_shape(name: str, shape: tuple[int, ...], hidden: int) -> tuple[int, ...]:
    """Projections see the wider hidden states on one side; head widths stay."""
    if len(shape) == 1:
        return shape
    return (hidden, shape[1]) if name.endswith("o_proj.weight") else (shape[0], hidden)


def random_bfloat16(shape: tuple[int, ...], generator: np.random.Generator) -> bytes:
    """Normal weights of deviation 0.03; vectors (norms) are ones."""
    if len(shape) == 1:
        values = np.ones(shape, np.float32)
    else:
        values = generator.standard_normal(shape, np.float32) * np.float32(0.03)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


if __name__ == "__main__":
    main()
