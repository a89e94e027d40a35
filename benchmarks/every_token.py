"""GPTQ's moments from routed tokens, or from every token through every expert: which plans better?

    python benchmarks/every_token.py [--task code] [--windows 4 --windows 36] [--model FOLDER]

Calibrates on a few and on many windows of 512 tokens, with `gptq_refit` (an expert's routed tokens,
by their gate) and `gptq_refit_all` (every token, by the router's score of the expert). Each plans
for shares of the experts' bytes; the first one's plan is packed both ways too. Measured is the mean
KL divergence from the whole model on held-out text; differences are paired, token by token. Prints
one table and writes benchmarks/results/every_token-<task>.json.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall others

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table

from edge_moe import metrics
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.calibrate import calibrate, text_packer
from edge_moe.converters.variants import PackedExperts, VariantScorer
from edge_moe.demo import demo_model_dir
from edge_moe.demo.equal_bytes import plan_for_share
from edge_moe.files import write_text
from edge_moe.measurement import Provenance
from edge_moe.metrics import Estimate, TokenScores
from edge_moe.runtime.heldout import heldout_windows
from edge_moe.runtime.tokenizer import load_tokenizer
from edge_moe.stats import ExpertStats

RESULTS = Path(__file__).resolve().parent / "results"
ROUTED, EVERY = "gptq_refit", "gptq_refit_all"
SHARES = (0.125, 0.25)
WINDOW_TOKENS = 256


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Model):
    """One share of the experts' bytes after one amount of calibration text."""

    calibration_tokens: int
    share: float
    routed_kld: Estimate
    every_kld: Estimate
    difference: Estimate
    """every - routed, each with its own plan."""
    same_plan_difference: Estimate
    """The same, both packing the plan of the routed tokens."""


class Calibration(_Model):
    """What calibrating cost."""

    calibration_tokens: int
    quantiser: str
    cpu_seconds: float
    fewest_routed_tokens: int
    """Of any expert."""


class EveryToken(_Model):
    """benchmarks/results/every_token-<task>.json"""

    provenance: Provenance
    model: str
    task: str
    heldout_tokens: int
    calibrations: list[Calibration]
    rows: list[Row]


class Comparison:
    """One model and task."""

    def __init__(self, model: Path, task: str, heldout: int) -> None:
        self.checkpoint = Checkpoint(model)
        self.task = task
        tokenizer = load_tokenizer(model)
        self.windows = heldout_windows(task, tokenizer, WINDOW_TOKENS, heldout)
        self.calibrations: list[Calibration] = []

    def rows(self, max_windows: int, work: Path) -> list[Row]:
        """Calibrate on `max_windows` both ways, plan, score."""
        stats = {name: self._calibrated(name, max_windows, work / name) for name in (ROUTED, EVERY)}
        plans = {
            (name, share): plan_for_share(self.checkpoint, stats[name], share)
            for name in stats
            for share in SHARES
        }
        scores: dict[tuple[str, str, float], TokenScores] = {}
        for packed_by, found in stats.items():
            packer = text_packer(self.checkpoint, found.info.options, found.info.data_fingerprint)
            packed = PackedExperts(self.checkpoint, packer)
            scorer = VariantScorer(self.checkpoint, self.windows, packed)
            wanted = {key: plan for key, plan in plans.items() if key[0] in (packed_by, ROUTED)}
            names = {f"{name} {share}": (name, share) for name, share in wanted}
            forms = {label: plans[key].forms for label, key in names.items()}
            for label, each in scorer.score(forms).items():
                scores[packed_by, *names[label]] = each
        tokens = stats[ROUTED].info.num_tokens
        return [_row(tokens, share, scores) for share in SHARES]

    def _calibrated(self, quantiser: str, max_windows: int, folder: Path) -> ExpertStats:
        start = time.process_time()
        stats = calibrate(
            *(self.checkpoint.folder, [self.task], folder),
            max_windows=max_windows,
            quantiser=quantiser,
        )
        self.calibrations.append(
            Calibration(
                calibration_tokens=stats.info.num_tokens,
                quantiser=quantiser,
                cpu_seconds=round(time.process_time() - start, 1),
                fewest_routed_tokens=int(stats.routed_tokens.min()),
            )
        )
        return stats


def _row(tokens: int, share: float, scores: dict[tuple[str, str, float], TokenScores]) -> Row:
    """Keys of `scores`: packed by, planned by, share."""
    routed, every = (scores[name, name, share].kld for name in (ROUTED, EVERY))
    return Row(
        calibration_tokens=tokens,
        share=share,
        routed_kld=metrics.mean_and_error(routed),
        every_kld=metrics.mean_and_error(every),
        difference=metrics.mean_and_error(every - routed),
        same_plan_difference=metrics.mean_and_error(scores[EVERY, ROUTED, share].kld - routed),
    )


def show(found: EveryToken, console: Console) -> None:
    """One row per amount of text and share."""
    table = Table(box=box.MARKDOWN)
    for heading in ("calibration tokens", "experts' bytes"):
        table.add_column(heading)
    for heading in ("KLD, routed tokens", "KLD, every token", "difference", "same plan"):
        table.add_column(heading, justify="right")
    for row in found.rows:
        table.add_row(
            *(f"{row.calibration_tokens:,}", f"{row.share:.1%}"),
            *(f"{row.routed_kld}", f"{row.every_kld}"),
            *(f"{row.difference}", f"{row.same_plan_difference}"),
        )
    console.print(table)
    for each in found.calibrations:
        console.print(
            f"{each.quantiser}, {each.calibration_tokens:,} tokens: {each.cpu_seconds:g} s of "
            f"processor time, an expert was routed {each.fewest_routed_tokens} tokens at least"
        )
    machine = found.provenance.machine
    console.print(f"{machine.cpu}, {machine.cores} cores")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=None, help="default: the demo model")
    parser.add_argument("--task", default="code")
    parser.add_argument("--windows", type=int, action="append", help="repeatable; default 1, 4, 36")
    parser.add_argument("--heldout", type=int, default=24, help="held-out windows of 256 tokens")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    arguments = parser.parse_args()
    model = arguments.model or demo_model_dir()
    comparison = Comparison(model, arguments.task, arguments.heldout)
    rows = []
    for max_windows in arguments.windows or [1, 4, 36]:
        with TemporaryDirectory(prefix="edge-moe-") as work:
            rows += comparison.rows(max_windows, Path(work))
    found = EveryToken(
        provenance=Provenance.published(),
        model="demo" if arguments.model is None else model.resolve().name,
        task=Path(arguments.task).stem,
        heldout_tokens=sum(len(window) - 1 for window in comparison.windows),
        calibrations=comparison.calibrations,
        rows=rows,
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"every_token-{found.task}.json"
    write_text(path, found.model_dump_json(indent=1) + "\n")
    show(found, Console(width=150))


if __name__ == "__main__":
    main()
