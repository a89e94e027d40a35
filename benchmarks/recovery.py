"""What recovery gives back to ternary experts: perplexity beside the original's, on held-out text.

    python benchmarks/recovery.py [--task code --task all] [--rank 32] [--steps 300] [--model DIR]

Every expert is stored as tq1_0. Rows: trits by absmean (no recovery), by least squares (Lloyd),
with routers fitted, and with low-rank branches too, trained on calibration text of one task (or of
all). Prints one table of perplexity ratios and writes benchmarks/results/recovery-*.json; a result
that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from edge_moe import __version__, metrics
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.recover import RecoveryReport, recover
from edge_moe.converters.recover_train import TrainSettings
from edge_moe.demo import demo_model_dir, task_names
from edge_moe.files import write_text
from edge_moe.formats import expert_bytes
from edge_moe.measurement import Provenance
from edge_moe.metrics import Estimate
from edge_moe.plan import MemoryTerm, Plan
from edge_moe.runtime.evaluate import open_model, score_windows
from edge_moe.runtime.heldout import heldout_windows
from edge_moe.tensor_info import FloatArray

RESULTS = Path(__file__).resolve().parent / "results"
FORM = "tq1_0"
WINDOW_TOKENS = 256
BLOCK = 256
ALL = "all"


class Row(BaseModel):
    """One way to store the experts, measured on one task's held-out text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    task: str
    ppl_ratio: Estimate
    kld: Estimate


class RecoveryResult(BaseModel):
    """The rows of one recovery (or, without a report, of packages that were not recovered)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provenance: Provenance
    model: str
    trained_on: str
    max_windows: int
    """Held-out windows per task at most."""
    recovery_seconds: float
    report: RecoveryReport | None
    rows: list[Row]


def one_form_plan(checkpoint: Checkpoint, form: str = FORM) -> Plan:
    """Every expert in one form. Only its forms and their bytes matter here."""
    spec = checkpoint.spec
    count = spec.num_experts
    one_bytes = expert_bytes(form, *spec.expert_shape)
    all_bytes = spec.num_moe_layers * count * one_bytes
    return Plan(
        edge_moe_version=__version__,
        model=str(checkpoint.folder),
        model_type=spec.model_type,
        model_fingerprint=checkpoint.fingerprint,
        stats_fingerprint="",
        tasks=[],
        target="native",
        device="cpu",
        budget_bytes=all_bytes,
        context_tokens=WINDOW_TOKENS,
        moe_layer_ids=list(spec.moe_layer_ids),
        top_k=spec.top_k,
        forms=[[form] * count for _ in spec.moe_layer_ids],
        tiers=[["device"] * count for _ in spec.moe_layer_ids],
        terms=[MemoryTerm(name="experts", num_bytes=all_bytes, source="plan")],
        loss=0.0,
        loss_unit="not estimated",
        frontier=[],
        rivals=[],
        saliency=[[1 / count] * count for _ in spec.moe_layer_ids],
        routed_share=[[1 / count] * count for _ in spec.moe_layer_ids],
        super_experts=[],
        limits=[],
    )


def absmean_checkpoint(checkpoint: Checkpoint, folder: Path) -> Path:
    """The same model with experts rounded as BitNet b1.58 does (arXiv:2402.17764, eq. 1-3), but one
    scale per 256 weights; tq1_0 holds them without further loss."""
    weights = shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(checkpoint.folder, folder, ignore=weights)
    spec = checkpoint.spec
    tensors = {info.name: checkpoint.read(info.name) for info in checkpoint.dense_tensors}
    for layer_id in spec.moe_layer_ids:
        for expert_id in range(spec.num_experts):
            names = spec.expert_tensor_names(layer_id, expert_id)
            matrices = checkpoint.expert(layer_id, expert_id)
            tensors |= {n: absmean(m) for n, m in zip(names, matrices, strict=True)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def absmean(weights: FloatArray) -> FloatArray:
    """[rows, width] -> trits times mean |w|, per block of 256."""
    blocks = weights.reshape(len(weights), -1, BLOCK)
    scale = np.abs(blocks).mean(axis=2, keepdims=True)
    trits = np.clip(np.rint(blocks / np.maximum(scale, np.float32(1e-12))), -1, 1)
    return np.ascontiguousarray((trits * scale).reshape(weights.shape), dtype=np.float32)


def measure(
    model: Path, packages: Mapping[str, Path], tasks: Sequence[str], max_windows: int
) -> list[Row]:
    """Every package beside the original on every task."""
    base = open_model(model, context_tokens=WINDOW_TOKENS, kernels="exact")
    opened = {
        n: open_model(path, context_tokens=WINDOW_TOKENS, kernels="exact")
        for n, path in packages.items()
    }
    rows = []
    for task in tasks:
        windows = heldout_windows(task, base.tokenizer, WINDOW_TOKENS, max_windows)
        for name, scores in score_windows(opened, base, windows).items():
            found = metrics.compare(scores)
            rows.append(Row(name=name, task=task, ppl_ratio=found.ppl_ratio, kld=found.mean_kld))
    for each in (base, *opened.values()):
        each.close()
    return rows


def plain(model: Path, work: Path, max_windows: int) -> RecoveryResult:
    """Ternary experts without recovery."""
    checkpoint = Checkpoint(model)
    rounded = Checkpoint(absmean_checkpoint(checkpoint, work / "absmean-model"))
    packages = {
        "absmean": build(one_form_plan(rounded), work / "absmean"),
        "Lloyd": build(one_form_plan(checkpoint), work / "lloyd"),
    }
    return RecoveryResult(
        provenance=Provenance.published(),
        model=model.name,
        trained_on="",
        max_windows=max_windows,
        recovery_seconds=0.0,
        report=None,
        rows=measure(model, packages, task_names(), max_windows),
    )


def recovered(
    model: Path, task: str, settings: TrainSettings, work: Path, max_windows: int
) -> RecoveryResult:
    """Lloyd's trits with routers fitted, and with branches too."""
    package = build(one_form_plan(Checkpoint(model)), work / "lloyd")
    tasks = task_names() if task == ALL else (task,)
    routed, whole = work / "routers", work / "branches"
    recover(package, model, tasks, routed, branches=False)
    start = time.perf_counter()
    report = recover(package, model, tasks, whole, settings=settings)
    seconds = time.perf_counter() - start
    packages = {"routers": routed, "routers and branches": whole}
    return RecoveryResult(
        provenance=Provenance.published(),
        model=model.name,
        trained_on=task,
        max_windows=max_windows,
        recovery_seconds=seconds,
        report=report,
        rows=measure(model, packages, task_names(), max_windows),
    )


def print_table(results: Sequence[RecoveryResult], console: Console) -> None:
    """Perplexity as a multiple of the original's; columns are tasks of the held-out text."""
    table = Table(box=box.MARKDOWN)
    for heading in ("trained on", "experts", "rank", "steps", *task_names()):
        table.add_column(heading)
    for result in results:
        report = result.report
        settings = report.settings if report else None
        for name in dict.fromkeys(row.name for row in result.rows):
            ratios = {row.task: f"{row.ppl_ratio}" for row in result.rows if row.name == name}
            is_trained = settings is not None and "branches" in name
            table.add_row(
                result.trained_on or "-",
                name,
                str(settings.rank) if settings and is_trained else "-",
                str(report.kept_step) if report and is_trained else "-",
                *(ratios.get(task, "") for task in task_names()),
            )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Recovery of ternary experts.")
    parser.add_argument("--model", type=Path, default=None, help="default: the demo model")
    parser.add_argument("--task", action="append", help=f"repeatable; a shipped task or {ALL}")
    parser.add_argument("--rank", type=int, default=TrainSettings().rank)
    parser.add_argument("--steps", type=int, default=TrainSettings().steps)
    parser.add_argument("--learning-rate", type=float, default=TrainSettings().learning_rate)
    parser.add_argument("--windows", type=int, default=24, help="held-out windows per task")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON files")
    args = parser.parse_args()
    model = args.model or demo_model_dir()
    settings = TrainSettings(rank=args.rank, steps=args.steps, learning_rate=args.learning_rate)
    args.output.mkdir(parents=True, exist_ok=True)
    results = []
    for task in ("", *(args.task or ["code", ALL])):
        options = f"-r{args.rank}-s{args.steps}-lr{args.learning_rate:g}" if task else ""
        path = args.output / f"recovery-{task or 'plain'}{options}.json"
        if not path.exists():
            with TemporaryDirectory(prefix="edge-moe-") as work:
                found = (
                    recovered(model, task, settings, Path(work), args.windows)
                    if task
                    else plain(model, Path(work), args.windows)
                )
            write_text(path, found.model_dump_json(indent=1) + "\n")
        results.append(RecoveryResult.model_validate_json(path.read_bytes()))
    console = Console(width=200)
    print_table(results, console)
    machine = results[0].provenance.machine
    console.print(f"{machine.cpu}, {machine.cores} cores")


if __name__ == "__main__":
    main()
