"""What the throughput benchmark stores and shows."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table

from edge_moe.measurement import Provenance
from edge_moe.units import format_bytes


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rates(_Model):
    """The machine, before and after all jobs: the better of both."""

    matrix_flops_per_second: float
    """Of one core."""
    read_bytes_per_second: float
    write_bytes_per_second: float


class Job(_Model):
    """One job on one model."""

    name: str
    seconds: float
    cpu_seconds: float
    """Of all threads together."""
    flops: float
    """At least; 0 where nothing is multiplied."""
    read_bytes: int
    written_bytes: int


class Costs(_Model):
    """All jobs on one model."""

    model: str
    num_parameters: int
    expert_parameters: int
    calibration_tokens: int
    forms: int
    """Lossy forms that calibration measures."""
    jobs: list[Job]


class Throughput(_Model):
    """benchmarks/results/throughput.json"""

    provenance: Provenance
    load_average: float
    """Before the first job: processes that share the cores."""
    rates: Rates
    models: list[Costs]


def compare(job: Job, rates: Rates) -> tuple[float, str, float]:
    """(seconds that the job takes at least, what limits it, the job's seconds of that kind)."""
    multiplying = job.flops / rates.matrix_flops_per_second
    moving = (
        job.read_bytes / rates.read_bytes_per_second
        + job.written_bytes / rates.write_bytes_per_second
    )
    if multiplying > moving:
        return multiplying, "core", job.cpu_seconds
    return moving, "disk", job.seconds


def show(found: Throughput, console: Console) -> None:
    """One row per job, with the machine below."""
    table = Table(box=box.MARKDOWN)
    table.add_column("model")
    table.add_column("job")
    headings = ("seconds", "processor seconds", "s per 10^9 parameters", "bound", "x bound")
    for heading in headings:
        table.add_column(heading, justify="right")
    for costs in found.models:
        billions = costs.num_parameters / 1e9
        for index, job in enumerate(costs.jobs):
            least, limit, seconds = compare(job, found.rates)
            table.add_row(
                *("" if index else costs.model, job.name),
                *(f"{job.seconds:.2f}", f"{job.cpu_seconds:.2f}"),
                f"{seconds / billions:,.0f}",
                f"{least / billions:,.1f} ({limit})",
                f"{seconds / least:.1f}",
            )
    console.print(table)
    for costs in found.models:
        console.print(
            f"{costs.model}: {costs.num_parameters / 1e6:.1f} M parameters, "
            f"{costs.expert_parameters / 1e6:.1f} M of them in experts; "
            f"{costs.calibration_tokens:,} tokens of calibration, {costs.forms} lossy forms"
        )
    rates, machine = found.rates, found.provenance.machine
    console.print(
        f"{machine.cpu}, {machine.cores} cores, load average {found.load_average:g}; float32 "
        f"products {rates.matrix_flops_per_second / 1e9:.0f} GFLOP/s a core; disk reads "
        f"{format_bytes(rates.read_bytes_per_second)}/s (O_DIRECT), writes "
        f"{format_bytes(rates.write_bytes_per_second)}/s"
    )
