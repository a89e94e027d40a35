"""Seconds per billion parameters of calibrating, transforming and building, beside their bounds.

    python benchmarks/throughput.py [--model FOLDER] [--windows 4] [--work FOLDER]

Without --model: the demo model, and a random one whose matrices are larger. Two bounds are known.
One core's rate of float32 matrix products bounds the operations that a job cannot do without (see
`work_bounds.py`); processor seconds are compared to it, whoever else uses the cores. The disk's
rates bound the bytes that a job read and wrote (/proc/self/io); elapsed seconds are compared to it.
The longer bound is shown. Files leave the page cache before every job. Transforms halve the number
of experts, HEAPr their width; they are given the statistics, HEAPr measures its gradients. Prints
one table and writes benchmarks/results/throughput.json.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall others

import torch
from machine_rates import direct_read_rate, forget, fsynced_write_rate, matrix_rate, process_io
from rich.console import Console
from synthetic import Sizes, synthetic_checkpoint
from throughput_record import Costs, Job, Rates, Throughput, show
from work_bounds import Work

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.calibrate import calibrate
from edge_moe.converters.form_loss import is_lossless
from edge_moe.converters.transform import transform
from edge_moe.converters.transform_request import TextLimits
from edge_moe.demo import demo_model_dir
from edge_moe.files import require_free_disk, write_text
from edge_moe.formats import DROP
from edge_moe.measurement import Provenance
from edge_moe.plan import Plan
from edge_moe.planner import make_plan
from edge_moe.stats import ExpertStats

RESULTS = Path(__file__).resolve().parent / "results"
WIDER = Sizes(num_layers=2, hidden_size=1024, expert_width=512, num_experts=8)
TASK = "code"
METHODS = ("prune", "dern", "sub-moe", "ream", "heapr")
BUILDS = (("bf16", "nearest"), ("q4_k", "nearest"), ("q4_k", "gptq_refit"))


@dataclass(frozen=True)
class Bench:
    """One model, and where its jobs write."""

    name: str
    checkpoint: Checkpoint
    folder: Path
    windows: int

    def costs(self) -> Costs:
        """Run every job."""
        checkpoint = self.checkpoint
        work = Work.of(checkpoint)
        stats, first = self._calibrate("calibrate", None, None)
        plain, second = self._calibrate("calibrate, statistics only", (), "nearest")
        parts = checkpoint.expert_ranges(checkpoint.spec.moe_layer_ids[0], 0)
        packed = [form for form in stats.info.forms if form != DROP]
        num_forms = sum(not is_lossless(form, parts) for form in packed)
        tokens = stats.info.num_tokens
        jobs = [
            first.model_copy(update={"flops": work.calibration(tokens, num_forms)}),
            second.model_copy(update={"flops": work.statistics(tokens)}),
            *self._transforms(work, plain),
            *self._builds(work, stats),
        ]
        return Costs(
            model=self.name,
            num_parameters=sum(math.prod(info.shape) for info in checkpoint.tensors.values()),
            expert_parameters=checkpoint.spec.num_moe_layers
            * checkpoint.spec.num_experts
            * checkpoint.spec.expert_weights,
            calibration_tokens=tokens,
            forms=num_forms,
            jobs=jobs,
        )

    def _calibrate(
        self, name: str, forms: tuple[str, ...] | None, quantiser: str | None
    ) -> tuple[ExpertStats, Job]:
        output = self.folder / name

        def job() -> None:
            calibrate(
                *(self.checkpoint.folder, [TASK], output),
                max_windows=self.windows,
                forms=forms,
                quantiser=quantiser,
            )

        done = self._timed(name, job)
        return ExpertStats.load(output), done

    def _transforms(self, work: Work, stats: ExpertStats) -> Iterator[Job]:
        spec, tokens = self.checkpoint.spec, stats.info.num_tokens
        kept, known = spec.num_experts // 2, self.folder / "calibrate, statistics only"
        flops = {
            "prune": 0.0,
            "dern": work.dern(kept),
            "sub-moe": work.sub_moe(tokens),
            "ream": work.ream(tokens, kept),
            "heapr": work.heapr(tokens),
        }
        for method in METHODS:
            output = self.folder / method

            def job(method: str = method, output: Path = output) -> None:
                is_narrow = method == "heapr"
                transform(
                    *(self.checkpoint.folder, [TASK], output, method),
                    num_experts=None if is_narrow else kept,
                    expert_width=spec.expert_width // 2 if is_narrow else None,
                    limits=TextLimits(max_windows=self.windows),
                    stats=None if is_narrow else known,
                )

            yield self._timed(f"transform {method}", job, flops[method])
            shutil.rmtree(output)

    def _builds(self, work: Work, stats: ExpertStats) -> Iterator[Job]:
        checkpoint, spec = self.checkpoint, self.checkpoint.spec
        plan = make_plan(
            checkpoint, stats, 10**15, model=str(checkpoint.folder), runtime=(0, "assumed")
        )
        for form, quantiser in BUILDS:
            output = self.folder / "built"
            uniform = plan.with_forms([[form] * spec.num_experts for _ in plan.forms])
            ready = packed_by(uniform, quantiser)

            def job(ready: Plan = ready, output: Path = output) -> None:
                build(ready, output, model=checkpoint.folder, target="native")

            is_gptq = quantiser != "nearest"
            name = "build, copied" if form == "bf16" else f"build {form}, {quantiser}"
            yield self._timed(name, job, work.gptq_build(stats.info.num_tokens) * is_gptq)
            shutil.rmtree(output)

    def _timed(self, name: str, job: Callable[[], object], flops: float = 0.0) -> Job:
        """Run `job` with a cold page cache."""
        Console(stderr=True).print(f"{self.name}: {name}")
        forget(self.checkpoint)
        before, start, cpu = process_io(), time.perf_counter(), time.process_time()
        job()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        after = process_io()
        return Job(
            name=name,
            seconds=round(seconds, 3),
            cpu_seconds=round(cpu_seconds, 3),
            flops=flops,
            read_bytes=after[0] - before[0],
            written_bytes=after[1] - before[1],
        )


def packed_by(plan: Plan, quantiser: str) -> Plan:
    """`plan`, built with another quantiser."""
    if plan.calibration is None:
        raise RuntimeError("the statistics do not say how they were made")
    options = plan.calibration.model_copy(update={"quantiser": quantiser})
    return plan.model_copy(update={"calibration": options})


def measure(models: dict[str, Path], folder: Path, windows: int) -> Throughput:
    """Rates, all jobs on all models, rates again."""
    load = os.getloadavg()[0]
    first = Checkpoint(next(iter(models.values())))
    before = _rates(first, folder)
    costs = []
    for name, model in models.items():
        work = folder / f"work-{name}"
        work.mkdir()
        costs.append(Bench(name, Checkpoint(model), work, windows).costs())
    after = _rates(first, folder)
    return Throughput(
        provenance=Provenance.published(),
        load_average=round(load, 2),
        rates=Rates(
            matrix_flops_per_second=max(before[0], after[0]),
            read_bytes_per_second=max(before[1], after[1]),
            write_bytes_per_second=max(before[2], after[2]),
        ),
        models=costs,
    )


def _rates(checkpoint: Checkpoint, folder: Path) -> tuple[float, float, float]:
    return matrix_rate(), direct_read_rate(checkpoint), fsynced_write_rate(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=None, help="checkpoint folder")
    parser.add_argument("--work", type=Path, default=Path.cwd(), help="folder on the disk to test")
    parser.add_argument("--windows", type=int, default=4, help="calibration windows of 512 tokens")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    arguments = parser.parse_args()
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
        found = measure(models, folder, arguments.windows)
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = found.model_dump_json(indent=1) + "\n"
    write_text(arguments.output / "throughput.json", text)
    show(found, Console(width=150))


if __name__ == "__main__":
    main()
