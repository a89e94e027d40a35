"""What the throughput benchmark stores and shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from edge_moe.errors import InputError
from edge_moe.measurement import Machine, Provenance
from edge_moe.units import format_bytes


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rates(_Model):
    """The machine, before and after all jobs: the better of both."""

    matrix_flops_per_second: float
    """Of one core."""
    read_bytes_per_second: float
    write_bytes_per_second: float

    def better(self, other: Rates) -> Rates:
        """The higher of both, each rate on its own."""
        mine, its = self.model_dump(), other.model_dump()
        return Rates(**{name: max(rate, its[name]) for name, rate in mine.items()})


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


class Rerun(_Model):
    """Rows that were measured later than the others."""

    provenance: Provenance
    load_average: float
    rows: list[str]


class Throughput(_Model):
    """benchmarks/results/throughput.json"""

    provenance: Provenance
    """Of all rows but those of `reruns`."""
    load_average: float
    """Before the first job: processes that share the cores."""
    rates: Rates
    models: list[Costs]
    reruns: list[Rerun] = []

    @classmethod
    def load(cls, path: Path) -> Throughput:
        """Read the file.

        Raises:
            InputError: not readable, or not such a file.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise InputError(f"{path} is not readable ({error}): measure all rows") from None

    def require_machine(self, other: Machine) -> None:
        """Refuse to put rows from the machine `other` into this table.

        Raises:
            InputError: another processor, or other cores.
        """
        machine = self.provenance.machine
        if (machine.cpu, machine.cores) != (other.cpu, other.cores):
            raise InputError(
                f"the other rows were measured on {machine.cpu} with {machine.cores} cores, this "
                f"is {other.cpu} with {other.cores}: measure all rows, or give another --output"
            )

    def require_sizes(self, costs: Costs) -> None:
        """Refuse rows of a model of the same name that were measured on something else.

        Raises:
            InputError: another number of parameters, tokens or forms.
        """
        sizes = costs.model_dump(exclude={"jobs"})
        known = {each.model: each.model_dump(exclude={"jobs"}) for each in self.models}
        if known.get(costs.model, sizes) != sizes:
            raise InputError(
                f"the other rows of {costs.model} were measured on another model or text: measure "
                "all rows, or give another --output"
            )


def merge(known: Throughput, later: Throughput, order: Sequence[str]) -> Throughput:
    """`known`, with the rows of `later` in place of its own or beside them, in `order` of names.

    Raises:
        InputError: they do not belong into one table.
    """
    known.require_machine(later.provenance.machine)
    models = {costs.model: costs for costs in known.models}
    for costs in later.models:
        known.require_sizes(costs)
        jobs = {job.name: job for job in models.get(costs.model, costs).jobs}
        jobs |= {job.name: job for job in costs.jobs}
        names = sorted(jobs, key=lambda name: order.index(name) if name in order else len(order))
        models[costs.model] = costs.model_copy(update={"jobs": [jobs[name] for name in names]})
    rows = list(dict.fromkeys(job.name for costs in later.models for job in costs.jobs))
    earlier = [
        each.model_copy(update={"rows": [name for name in each.rows if name not in rows]})
        for each in known.reruns
    ]
    rerun = Rerun(provenance=later.provenance, load_average=later.load_average, rows=rows)
    return known.model_copy(
        update={
            "rates": known.rates.better(later.rates),
            "models": list(models.values()),
            "reruns": [each for each in [*earlier, rerun] if each.rows],
        }
    )


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
    for rerun in found.reruns:
        console.print(
            f"{', '.join(rerun.rows)}: {rerun.provenance.time:%Y-%m-%d}, load average "
            f"{rerun.load_average:g}"
        )
