"""A small dense model upcycled: full-precision experts, ternary ones, and ternary afterwards.

    python benchmarks/upcycle.py --work DIR [--dense DIR] [--steps 3000] [--dense-steps 4500]

Makes what is missing in DIR: the demo corpora, a dense model trained on them (under an hour of two
cores; or --dense, as SmolLM2's folder or file, with --data), the upcycled models, and prints one
table of perplexity per domain and bytes. Everything resumes. The result is
benchmarks/results/upcycle-NAME.json.

    dense                the model itself
    full precision       routed experts in 16 bits
    ternary afterwards   those packed in trits, by least squares and by GPTQ with calibration text
    MoTE                 routed experts trained in trits, packed without loss
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from recovery import one_form_plan
from rich import box
from rich.console import Console
from rich.table import Table

from edge_moe import metrics
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.calibrate import calibrate
from edge_moe.converters.upcycle.dense_model import DenseModel, open_dense
from edge_moe.converters.upcycle.record import RECORD_NAME, UpcycleRecord
from edge_moe.converters.upcycle.student import UpcycleSettings
from edge_moe.converters.upcycle.trained_layers import ternary_forms
from edge_moe.converters.upcycle.upcycle import upcycle
from edge_moe.converters.window_training import checked_settings
from edge_moe.demo import task_names
from edge_moe.demo.corpus import DOMAINS, corpus_path
from edge_moe.demo.full_bill import CONTEXT_TOKENS
from edge_moe.files import write_text
from edge_moe.formats import expert_bytes, form_bits
from edge_moe.measurement import Provenance
from edge_moe.metrics import Estimate
from edge_moe.overhead import runtime_overhead
from edge_moe.plan import Plan
from edge_moe.planner import make_plan
from edge_moe.runtime.evaluate import open_model, progress, score_windows
from edge_moe.runtime.heldout import heldout_windows
from edge_moe.tasks import task_label
from edge_moe.units import format_bytes

RESULTS = Path(__file__).resolve().parent / "results"
WINDOW_TOKENS = 256
DENSE, FULL = "dense", "full precision"
AFTER, AFTER_GPTQ = "ternary afterwards, least squares", "ternary afterwards, GPTQ"
_PLENTY_BYTES = 10**12


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Model):
    """One way to make or store the model, on every domain."""

    name: str
    bits_per_routed_weight: float
    routed_bytes: int
    other_bytes: int
    """Everything else, as the dense model stores it."""
    ppl: dict[str, Estimate]
    ppl_ratio: dict[str, Estimate]
    """To the dense model, paired token by token."""
    is_lossless: bool | None
    """Packed: whether every logit is that of the model before packing; None where it is not
    packed, or packed with loss on purpose."""


class Training(_Model):
    """How one of the models was made."""

    name: str
    seconds: float
    record: UpcycleRecord


class UpcycleResult(_Model):
    """The table, and how to make it again."""

    provenance: Provenance
    model: str
    num_windows: int
    """Held-out windows per domain at most."""
    trainings: list[Training]
    rows: list[Row]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name.startswith(name))


@dataclass(frozen=True)
class Job:
    """What is measured, where its parts lie."""

    dense: Path
    data: Sequence[str]
    work: Path
    settings: UpcycleSettings
    num_experts: int
    top_k: int
    max_windows: int | None
    heldout_windows: int
    tasks: Sequence[str]


def run_module(module: str, *arguments: object) -> None:
    """A script of the package, in a process of its own."""
    root = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-m", module, *map(str, arguments)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": root})


def trained_dense(work: Path, steps: int) -> Path:
    """The demo's dense model, trained where it is not there yet."""
    output = work / "dense-model"
    if (output / "config.json").exists():
        return output
    if not all(corpus_path(work, name, "train").exists() for name in DOMAINS):
        run_module("edge_moe.demo.corpus", "--work", work)
    if not (work / "tokenizer/tokenizer.json").exists() or not (work / "tokens").exists():
        run_module("edge_moe.demo.tokenizer", "--work", work)
    arguments = ("--steps", steps, "--decay-steps", steps // 4)
    run_module("edge_moe.demo.train", "--work", work, "--out", output, "--dense", *arguments)
    return output


def upcycled(job: Job, name: str, **changes: object) -> tuple[Path, Training]:
    """The folder of one upcycling, made where it is not there yet."""
    output, timing = job.work / name, job.work / f"{name}.seconds"
    if not output.exists():
        start = time.perf_counter()
        upcycle(
            job.dense,
            job.data,
            output,
            num_experts=job.num_experts,
            top_k=job.top_k,
            settings=job.settings.model_copy(update=changes),
            window_tokens=WINDOW_TOKENS,
            max_windows=job.max_windows,
            name=job.dense.name,
        )
        write_text(timing, f"{time.perf_counter() - start:.1f}\n")
    record = UpcycleRecord.model_validate_json((output / RECORD_NAME).read_bytes())
    record = record.model_copy(update={"provenance": record.provenance.without_folder()})
    seconds = float(timing.read_text()) if timing.exists() else 0.0
    return output, Training(name=name, seconds=seconds, record=record)


def built(output: Path, make: Callable[[], Plan], model: Path) -> Path:
    """A native package, built where it is not there yet."""
    return output if output.exists() else build(make(), output, model=model)


def calibrated_plan(job: Job, model: Path, form: str) -> Plan:
    """Every expert in one form, packed by the default quantiser with calibration text."""
    checkpoint, folder = Checkpoint(model), job.work / "stats"
    stats = calibrate(model, list(job.tasks), folder, window_tokens=WINDOW_TOKENS, forms=[form])
    plan = make_plan(
        checkpoint,
        stats,
        _PLENTY_BYTES,
        model=str(model),
        context_tokens=CONTEXT_TOKENS,
        runtime=runtime_overhead(checkpoint.spec.model_type, "cpu"),
    )
    spec = checkpoint.spec
    return plan.with_forms([[form] * spec.num_experts for _ in spec.moe_layer_ids])


@dataclass(frozen=True)
class Contender:
    """One row's model: where it lies, in which form its routed experts are."""

    path: Path
    form: str | None
    """None: it has no routed experts."""
    unpacked: str | None = None
    """The contender whose logits it must have."""


def contenders(job: Job) -> tuple[dict[str, Contender], list[Training]]:
    """Every model of the table by its name, the dense one first."""
    untrained, _ = upcycled(job, "untrained", steps=0, is_ternary=False)
    full, of_full = upcycled(job, "full-precision", is_ternary=False)
    mote, of_mote = upcycled(job, "mote", is_ternary=True)
    stored = Checkpoint(full).spec.dtype.replace("bfloat", "bf").replace("float", "f")
    forms = ternary_forms(job.settings.group)[:2]
    found = {
        DENSE: Contender(untrained, None),
        FULL: Contender(full, stored),
        "MoTE, not packed": Contender(mote, stored),
    }
    for form in forms:
        make = partial(one_form_plan, Checkpoint(mote), form)
        package = built(job.work / f"mote-{form}", make, mote)
        found[f"MoTE, {form}"] = Contender(package, form, "MoTE, not packed")
    least = forms[0]
    after = built(job.work / "after", lambda: one_form_plan(Checkpoint(full), least), full)
    gptq = built(job.work / "after-gptq", lambda: calibrated_plan(job, full, least), full)
    found |= {AFTER: Contender(after, least), AFTER_GPTQ: Contender(gptq, least)}
    return found, [of_full, of_mote]


def heldout_scores(
    paths: Mapping[str, Path], tasks: Sequence[str], num_windows: int
) -> dict[str, dict[str, metrics.TokenScores]]:
    """By task and model, each beside `DENSE`, one of them. Memory: all models at once."""
    opened = {
        name: open_model(path, context_tokens=WINDOW_TOKENS, kernels="exact")
        for name, path in paths.items()
    }
    base, scores = opened[DENSE], {}
    for task in tasks:
        windows = heldout_windows(task, base.tokenizer, WINDOW_TOKENS, num_windows)
        with progress(task, len(windows)) as advance:
            scores[task_label(task)] = score_windows(opened, base, windows, advance)
    for each in opened.values():
        each.close()
    return scores


def measure(job: Job) -> UpcycleResult:
    """Make and score everything on held-out text. Memory: all models at once."""
    models, trainings = contenders(job)
    paths = {name: each.path for name, each in models.items()}
    scores = heldout_scores(paths, job.tasks, job.heldout_windows)
    dense = open_dense(job.dense)
    return UpcycleResult(
        provenance=Provenance.published(),
        model=job.dense.name,
        num_windows=job.heldout_windows,
        trainings=trainings,
        rows=[_row(job, dense, name, each, scores) for name, each in models.items()],
    )


def _row(
    job: Job,
    dense: DenseModel,
    name: str,
    contender: Contender,
    scores: Mapping[str, Mapping[str, metrics.TokenScores]],
) -> Row:
    one, bits = 0, 0.0
    if contender.form is not None:
        bits = form_bits(contender.form)
        one = expert_bytes(contender.form, dense.config.hidden_size, dense.config.ffn_width)
    own = {task: found[name] for task, found in scores.items()}
    is_lossless = None
    if contender.unpacked is not None:
        pairs = [(found[name].nll, found[contender.unpacked].nll) for found in scores.values()]
        is_lossless = all(bool((one_nll == other).all()) for one_nll, other in pairs)
    return Row(
        name=name,
        bits_per_routed_weight=bits,
        routed_bytes=dense.config.num_layers * job.num_experts * one,
        other_bytes=sum(tensor.entry.num_bytes for tensor in dense.tensors.values()),
        ppl={task: metrics.perplexity(found.nll) for task, found in own.items()},
        ppl_ratio={task: metrics.compare(found).ppl_ratio for task, found in own.items()},
        is_lossless=is_lossless,
    )


def print_table(result: UpcycleResult, console: Console) -> None:
    """One Markdown row per model."""
    table = Table(box=box.MARKDOWN)
    tasks = list(result.rows[0].ppl)
    for heading in ("routed experts", "bits", "their bytes", "other bytes", *tasks):
        table.add_column(heading)
    for row in result.rows:
        table.add_row(
            row.name,
            f"{row.bits_per_routed_weight:.2f}" if row.routed_bytes else "-",
            format_bytes(row.routed_bytes) if row.routed_bytes else "-",
            format_bytes(row.other_bytes),
            *(f"{row.ppl[task]}" for task in tasks),
        )
    console.print(table)


def arguments_parser(description: str, dense_steps: int) -> argparse.ArgumentParser:
    """With what says which dense model, which text and where; `dense_steps` is a default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--dense", type=Path, default=None, help="default: trained here")
    parser.add_argument("--dense-steps", type=int, default=dense_steps, help="of that training")
    parser.add_argument("--data", action="append", help="repeatable; default: the demo corpora")
    parser.add_argument("--task", action="append", help="repeatable; default: all shipped tasks")
    parser.add_argument("--windows", type=int, default=48, help="held-out windows per task")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with what is missing made: the dense model, the names of text."""
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.dense = args.dense or trained_dense(args.work, args.dense_steps)
    args.data = args.data or [str(corpus_path(args.work, name, "train")) for name in DOMAINS]
    args.task = args.task or task_names()
    return args


def write_result(result: BaseModel, kind: str, args: argparse.Namespace) -> None:
    """`KIND-NAME.json` of the dense model, which names no folder of this machine."""
    args.output.mkdir(parents=True, exist_ok=True)
    text = result.model_dump_json(indent=1).replace(str(args.work), "DIR")
    write_text(args.output / f"{kind}-{args.dense.stem}.json", text + "\n")


def main() -> None:
    parser = arguments_parser("Upcycle a small dense model in every way.", dense_steps=4500)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--group", type=int, default=256, help="64 for SmolLM2, whose rows are 576")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=UpcycleSettings().learning_rate)
    parser.add_argument("--kl-weight", type=float, default=0.0)
    parser.add_argument("--int8", action="store_true", help="round experts' inputs in training")
    parser.add_argument("--max-windows", type=int, default=None, help="windows of text read")
    args = parsed(parser)
    job = Job(
        dense=args.dense,
        data=args.data,
        work=args.work,
        settings=checked_settings(
            UpcycleSettings,
            steps=args.steps,
            batch_windows=args.batch,
            learning_rate=args.lr,
            kl_weight=args.kl_weight,
            has_int8_activations=args.int8,
            group=args.group,
        ),
        num_experts=args.experts,
        top_k=args.top_k,
        max_windows=args.max_windows,
        heldout_windows=args.windows,
        tasks=args.task,
    )
    result = measure(job)
    write_result(result, "upcycle", args)
    console = Console(width=220)
    print_table(result, console)
    machine = result.provenance.machine
    console.print(f"{machine.cpu}, {machine.cores} cores")


if __name__ == "__main__":
    main()
