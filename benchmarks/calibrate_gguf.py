"""Calibration on llama.cpp beside plain llama.cpp evaluation of the same text, as a ratio.

    python benchmarks/calibrate_gguf.py [--model FILE.gguf] [--windows 8] [--rounds 5]

Plain evaluation is what `edge-moe eval` asks of llama.cpp: logits of every token, weights repacked
for the processor. Beside it the same windows while their MoE blocks are watched and written to
disk, at top_k + 1 and without the output head; then whole calibrations, with `drop` alone and with
the forms that a calibration measures by default, rounded to nearest. All but the last take turns,
round after round in one process; the table shows the fastest of each. Without --model a random
checkpoint is made and exported, four layers of 32 experts in q4_0.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall others
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from synthetic import Sizes, synthetic_checkpoint

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.calibrate_gguf import (
    LayerExtras,
    block_records,
    calibrate_gguf,
    gguf_calibration_text,
)
from edge_moe.converters.calibration_request import CalibrationRequest
from edge_moe.converters.export_gguf import export_gguf
from edge_moe.converters.window_spool import WindowSpool, WindowWriter
from edge_moe.files import write_text
from edge_moe.formats import DROP
from edge_moe.gguf_model import GgufModel
from edge_moe.measurement import Machine, this_machine
from edge_moe.offer import gguf_forms
from edge_moe.plan import MemoryTerm, Plan
from edge_moe.runtime import gguf_logits
from edge_moe.runtime.llama_capture import BlockCapture, LlamaCapture
from edge_moe.spec import ModelSpec
from edge_moe.units import format_bytes

RESULTS = Path(__file__).resolve().parent / "results" / "calibrate_gguf.json"
SIZES = Sizes(num_layers=4, hidden_size=1024, expert_width=512, num_experts=32)
FORM = "q4_0"
TASK = "code"


class Timing(BaseModel):
    """One way to run the text."""

    model_config = ConfigDict(frozen=True)

    name: str
    seconds: list[float]
    """One per round."""
    ratio: float
    """Fastest round over that of plain evaluation."""


class Record(BaseModel):
    """What the benchmark writes."""

    model_config = ConfigDict(frozen=True)

    machine: Machine
    model: str
    model_bytes: int
    num_layers: int
    num_experts: int
    top_k: int
    num_tokens: int
    window_tokens: int
    forms: list[str]
    load_average: float
    """Of the machine when the benchmark began: 0 is idle."""
    timings: list[Timing]


@dataclass
class Contender:
    name: str
    run: Callable[[], None]
    rounds: int
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    """Measure in turn, print one table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=None, help="default: a random one")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        path = arguments.model or random_gguf(work)
        bench = Bench(path, work, arguments.windows, arguments.window_tokens)
        contenders = bench.contenders(arguments.rounds)
        for number in range(arguments.rounds):
            for contender in contenders:
                if number < contender.rounds:
                    start = time.perf_counter()
                    contender.run()
                    contender.seconds.append(time.perf_counter() - start)
        bench.close()
        record = bench.record(contenders, load_average, arguments.model)
    show(record)
    write_text(arguments.output, record.model_dump_json(indent=1) + "\n")


class Bench:
    """One model and one text, ready to be run in every way."""

    def __init__(self, path: Path, work: Path, num_windows: int, window_tokens: int) -> None:
        self.model = GgufModel(path)
        self.work = work
        self.forms = [form for form in gguf_forms(self.model) if form != DROP]
        request = CalibrationRequest(
            (TASK,), window_tokens, num_windows, (0, 1), (DROP,), "nearest"
        )
        self.info, self.texts = gguf_calibration_text(self.model, request)
        self.plain = gguf_logits.GgufModel(path, window_tokens)
        self.capture = LlamaCapture(
            path, self.model.spec, self.model.header.architecture, window_tokens
        )

    def contenders(self, rounds: int) -> list[Contender]:
        return [
            Contender("plain llama.cpp", self._evaluate, rounds),
            Contender("windows watched, to disk", self._watch, rounds),
            Contender("calibrate --forms drop", lambda: self._calibrate((DROP,)), rounds),
            Contender("calibrate, default forms", lambda: self._calibrate(self.forms), 1),
        ]

    def record(
        self, contenders: Sequence[Contender], load_average: float, given: Path | None
    ) -> Record:
        spec, plain = self.model.spec, min(contenders[0].seconds)
        return Record(
            machine=this_machine(),
            model="random" if given is None else given.name,
            model_bytes=self.model.file_bytes,
            num_layers=spec.num_layers,
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            num_tokens=self.info.num_tokens,
            window_tokens=self.info.window_tokens,
            forms=self.forms,
            load_average=load_average,
            timings=[
                Timing(name=each.name, seconds=each.seconds, ratio=min(each.seconds) / plain)
                for each in contenders
            ],
        )

    def close(self) -> None:
        self.plain.close()
        self.capture.close()

    def _evaluate(self) -> None:
        for text in self.texts:
            self.plain.logits(text)

    def _watch(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            spec = self.model.spec
            extras = {layer: LayerExtras.of(self.model, layer) for layer in spec.moe_layer_ids}
            spool = WindowSpool(Path(folder) / "windows", spec, [len(text) for text in self.texts])
            for index, text in enumerate(self.texts):
                with spool.writing(index) as writer:
                    self.capture.run(text, partial(_keep, writer, spec, extras))

    def _calibrate(self, forms: Sequence[str]) -> None:
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            calibrate_gguf(
                self.model.path,
                [TASK],
                Path(folder) / "stats",
                forms=forms,
                window_tokens=self.info.window_tokens,
                max_windows=len(self.texts),
                quantiser="nearest",
            )


def _keep(
    writer: WindowWriter,
    spec: ModelSpec,
    extras: Mapping[int, LayerExtras],
    layer_id: int,
    tokens: slice,
    block: BlockCapture,
) -> None:
    writer.put(layer_id, tokens, block_records(block, spec, extras[layer_id]))


def random_gguf(work: Path) -> Path:
    """The random checkpoint as a GGUF file."""
    checkpoint = Checkpoint(synthetic_checkpoint(work / "checkpoint", SIZES))
    spec = checkpoint.spec
    unknown = [[0.0] * spec.num_experts] * spec.num_moe_layers
    plan = Plan(
        edge_moe_version="0",
        model=str(checkpoint.folder),
        model_type=spec.model_type,
        model_fingerprint=checkpoint.fingerprint,
        stats_fingerprint="",
        tasks=[TASK],
        target="gguf",
        device="cpu",
        budget_bytes=10**12,
        context_tokens=256,
        moe_layer_ids=list(spec.moe_layer_ids),
        top_k=spec.top_k,
        forms=[[FORM] * spec.num_experts] * spec.num_moe_layers,
        tiers=[["device"] * spec.num_experts] * spec.num_moe_layers,
        terms=[
            MemoryTerm(name=name, num_bytes=1, source="assumed") for name in ("experts", "runtime")
        ],
        loss=0.0,
        loss_unit="",
        frontier=[],
        rivals=[],
        saliency=unknown,
        routed_share=unknown,
        super_experts=[],
        limits=[],
    )
    return export_gguf(plan, checkpoint, work / "model.gguf")


def show(record: Record) -> None:
    """One table on stdout."""
    table = Table(
        title=f"{record.num_tokens} tokens, {record.model} model of "
        f"{format_bytes(record.model_bytes)}, {record.num_layers} layers of {record.num_experts} "
        f"experts, top-{record.top_k}; {record.machine.cpu}, load {record.load_average:.1f}"
    )
    table.add_column("run")
    table.add_column("seconds", justify="right")
    table.add_column("tokens/s", justify="right")
    table.add_column("x plain", justify="right")
    for timing in record.timings:
        best = min(timing.seconds)
        rate = record.num_tokens / best
        table.add_row(timing.name, f"{best:.2f}", f"{rate:,.0f}", f"{timing.ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
