"""The jobs of the throughput benchmark: what runs, on what, and the operations that it takes."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from machine_rates import forget, process_io
from recovery import one_form_plan
from rich.console import Console
from throughput_record import Costs, Job
from work_bounds import Work

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.calibrate import calibrate
from edge_moe.converters.calibrate_gradients import calibrate_with_gradients
from edge_moe.converters.calibration_request import checked_forms
from edge_moe.converters.form_loss import is_lossless
from edge_moe.converters.recover import RecoveryReport, recover
from edge_moe.converters.recover_text import TrainText, split_text
from edge_moe.converters.recover_train import TrainSettings
from edge_moe.converters.transform import transform
from edge_moe.converters.transform_record import TransformRecord
from edge_moe.converters.transform_request import TextLimits
from edge_moe.converters.transforms import get_method
from edge_moe.formats import DROP
from edge_moe.plan import Plan
from edge_moe.planner import make_plan
from edge_moe.runtime.tokenizer import load_tokenizer
from edge_moe.stats import ExpertStats

TASK = "code"
FULL, GRADIENTS, PLAIN = "calibrate", "calibrate --gradients", "calibrate, statistics only"
TRANSFORMS: dict[str, Callable[[Work, int, int], float]] = {
    "prune": lambda work, tokens, kept: 0.0,
    "dern": lambda work, tokens, kept: work.dern(kept),
    "m-smoe": lambda work, tokens, kept: work.m_smoe(tokens, kept),
    "sub-moe": lambda work, tokens, kept: work.sub_moe(tokens),
    "naee": lambda work, tokens, kept: work.naee(tokens, kept),
    "ream": lambda work, tokens, kept: work.ream(tokens, kept),
    "heapr": lambda work, tokens, kept: work.heapr(tokens),
}
"""Operations of every method, given the tokens it runs the layers on and the experts it keeps."""
BUILDS = {
    "build, copied": ("bf16", "nearest"),
    "build q4_k, nearest": ("q4_k", "nearest"),
    "build q4_k, gptq_refit": ("q4_k", "gptq_refit"),
}
"""Name -> form, quantiser."""
STEPS = 30
"""Training steps of the branches: a tenth of `edge-moe recover`'s default."""
WINDOW_TOKENS = 256
ROUTERS, BRANCHES = "recover, routers", f"recover, branches, {STEPS} steps"
ROW_NAMES = (
    *(FULL, GRADIENTS, PLAIN),
    *(f"transform {method}" for method in TRANSFORMS),
    *BUILDS,
    *(ROUTERS, BRANCHES),
)
"""In the order of the table."""


@dataclass(frozen=True)
class Ready:
    """A job whose inputs are there."""

    run: Callable[[], Any]
    """What is timed."""
    flops: Callable[[Any], float]
    """From what `run` returned."""
    scratch: Path | None = None
    """Its output, where nothing else needs it."""


@dataclass(frozen=True)
class Bench:
    """One model, and where its jobs write."""

    name: str
    checkpoint: Checkpoint
    folder: Path
    windows: int

    def costs(self, is_wanted: Callable[[str], bool]) -> Costs:
        """Run the wanted rows, and before them, untimed, what they need."""
        spec = self.checkpoint.spec
        jobs = [self._timed(name, self._ready(name)) for name in ROW_NAMES if is_wanted(name)]
        return Costs(
            model=self.name,
            num_parameters=sum(math.prod(i.shape) for i in self.checkpoint.tensors.values()),
            expert_parameters=spec.num_moe_layers * spec.num_experts * spec.expert_weights,
            calibration_tokens=self._stats(PLAIN).info.num_tokens,
            forms=self._num_lossy_forms,
            jobs=jobs,
        )

    @cached_property
    def _work(self) -> Work:
        return Work.of(self.checkpoint)

    @cached_property
    def _num_lossy_forms(self) -> int:
        """Forms that calibration measures."""
        spec = self.checkpoint.spec
        dtypes = self.checkpoint.expert_dtypes(spec.moe_layer_ids[0], 0)
        packed = [form for form in checked_forms(spec, None) if form != DROP]
        return sum(not is_lossless(form, dtypes) for form in packed)

    def _ready(self, name: str) -> Ready:
        makers: dict[str, Callable[[], Ready]] = {
            **{each: partial(self._calibrate, each) for each in (FULL, GRADIENTS, PLAIN)},
            **{f"transform {each}": partial(self._transform, each) for each in TRANSFORMS},
            **{each: partial(self._build, *BUILDS[each]) for each in BUILDS},
            ROUTERS: self._recover_routers,
            BRANCHES: self._recover_branches,
        }
        return makers[name]()

    def _calibrate(self, name: str) -> Ready:
        work, num_forms = self._work, self._num_lossy_forms
        arguments = self.checkpoint.folder, [TASK], self.folder / name
        if name == GRADIENTS:
            return Ready(
                lambda: calibrate_with_gradients(*arguments, max_windows=self.windows),
                lambda stats: work.calibration_with_gradients(stats.info.num_tokens, num_forms),
            )
        if name == PLAIN:
            return Ready(
                lambda: calibrate(
                    *arguments, max_windows=self.windows, forms=(), quantiser="nearest"
                ),
                lambda stats: work.statistics(stats.info.num_tokens),
            )
        return Ready(
            lambda: calibrate(*arguments, max_windows=self.windows),
            lambda stats: work.calibration(stats.info.num_tokens, num_forms),
        )

    def _stats(self, name: str) -> ExpertStats:
        """The statistics of a calibration; run, untimed, if its row was not wanted."""
        if not (self.folder / name).exists():
            self._calibrate(name).run()
        return ExpertStats.load(self.folder / name)

    def _transform(self, method: str) -> Ready:
        spec, output = self.checkpoint.spec, self.folder / method
        is_narrow = get_method(method).shrinks == "width"
        kept = spec.num_experts // 2
        if not is_narrow:
            self._stats(PLAIN)

        def run() -> TransformRecord:
            return transform(
                *(self.checkpoint.folder, [TASK], output, method),
                num_experts=None if is_narrow else kept,
                expert_width=spec.expert_width // 2 if is_narrow else None,
                limits=TextLimits(max_windows=self.windows),
                stats=None if is_narrow else self.folder / PLAIN,
            )

        def flops(record: TransformRecord) -> float:
            tokens = record.num_tokens if is_narrow else record.sample_tokens
            return TRANSFORMS[method](self._work, tokens, kept)

        return Ready(run, flops, output)

    def _build(self, form: str, quantiser: str) -> Ready:
        checkpoint, output = self.checkpoint, self.folder / "built"
        stats = self._stats(FULL)
        plan = make_plan(
            checkpoint, stats, 10**15, model=str(checkpoint.folder), runtime=(0, "assumed")
        )
        uniform = plan.with_forms([[form] * checkpoint.spec.num_experts for _ in plan.forms])
        ready, is_gptq = packed_by(uniform, quantiser), quantiser != "nearest"
        return Ready(
            lambda: build(ready, output, model=checkpoint.folder, target="native"),
            lambda _: self._work.gptq_build(stats.info.num_tokens) * is_gptq,
            output,
        )

    def _recover_routers(self) -> Ready:
        package, output = self._ternary_package(), self.folder / "routers"
        text = self._training_text(package)
        return Ready(
            lambda: self._recover(package, output, routers=True, branches=False),
            lambda _: self._work.recover_routers(sum(map(len, text.windows))),
            output,
        )

    def _recover_branches(self) -> Ready:
        package, output = self._ternary_package(), self.folder / "branches"
        text, settings = self._training_text(package), TrainSettings(steps=STEPS)
        judged = [text.windows[index] for index in text.indices(False)]

        def flops(report: RecoveryReport) -> float:
            return self._work.recover_branches(
                sum(map(len, text.windows)),
                fewest_learned_tokens(text, settings.steps * settings.batch_windows),
                sum(map(len, judged)) * len(report.losses),
                settings.rank,
            )

        return Ready(
            lambda: self._recover(package, output, routers=False, branches=True, settings=settings),
            flops,
            output,
        )

    def _recover(self, package: Path, output: Path, **options: Any) -> RecoveryReport:
        return recover(
            *(package, self.checkpoint.folder, [TASK], output),
            window_tokens=WINDOW_TOKENS,
            max_windows=self.windows * 512 // WINDOW_TOKENS,
            **options,
        )

    def _training_text(self, package: Path) -> TrainText:
        return split_text(
            *([TASK], load_tokenizer(package), self.checkpoint.spec.max_position_embeddings),
            WINDOW_TOKENS,
            self.windows * 512 // WINDOW_TOKENS,
        )

    def _ternary_package(self) -> Path:
        """Every expert in trits, for recovery to repair."""
        folder = self.folder / "ternary"
        if not folder.exists():
            build(one_form_plan(self.checkpoint), folder, model=self.checkpoint.folder)
        return folder

    def _timed(self, name: str, ready: Ready) -> Job:
        """Run a job with a cold page cache."""
        Console(stderr=True).print(f"{self.name}: {name}")
        forget(self.checkpoint)
        before, start, cpu = process_io(), time.perf_counter(), time.process_time()
        found = ready.run()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        after = process_io()
        if ready.scratch is not None:
            shutil.rmtree(ready.scratch)
        return Job(
            name=name,
            seconds=round(seconds, 3),
            cpu_seconds=round(cpu_seconds, 3),
            flops=ready.flops(found),
            read_bytes=after[0] - before[0],
            written_bytes=after[1] - before[1],
        )


def packed_by(plan: Plan, quantiser: str) -> Plan:
    """`plan`, built with another quantiser."""
    if plan.calibration is None:
        raise RuntimeError("the statistics do not say how they were made")
    options = plan.calibration.model_copy(update={"quantiser": quantiser})
    return plan.model_copy(update={"calibration": options})


def fewest_learned_tokens(text: TrainText, num_positions: int) -> int:
    """No order of the windows learns from fewer tokens: whole epochs, then the shortest windows."""
    lengths = sorted(len(text.windows[index]) for index in text.indices(True))
    epochs, rest = divmod(num_positions, len(lengths))
    return epochs * sum(lengths) + sum(lengths[:rest])
