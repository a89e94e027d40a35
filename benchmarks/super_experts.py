"""Does a model have super experts, and does zeroing them hurt more than zeroing random ones?

    python benchmarks/super_experts.py [--model FOLDER] [--task prose --task code] [--draws 10]

Experts are found by the rule of arXiv 2507.23279 (see `edge_moe.super_experts`) on the tasks'
calibration text. Where the rule finds none, the loudest of the rule's layers are taken, and the
table says so. "Zeroed" is the paper's test: the router still chooses the expert, which then adds
nothing. Every draw zeroes as many other experts of the same layers. Prints one table of held-out
perplexity and KL divergence and writes benchmarks/results/super_experts-<model>.json.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall others

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table

from edge_moe import metrics
from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.calibrate import calibrate
from edge_moe.converters.form_loss import is_lossless
from edge_moe.converters.variants import PackedExperts, VariantScorer
from edge_moe.demo import demo_model_dir, task_names
from edge_moe.errors import InputError
from edge_moe.files import write_text
from edge_moe.formats import expert_bytes
from edge_moe.formats.base import ByteArray
from edge_moe.measurement import Provenance
from edge_moe.metrics import Estimate, TokenScores
from edge_moe.runtime.heldout import heldout_windows
from edge_moe.runtime.tokenizer import load_tokenizer
from edge_moe.spec import ModelSpec
from edge_moe.stats import ExpertStats
from edge_moe.super_experts import SHARE_OF_LAYERS, find_super_experts

RESULTS = Path(__file__).resolve().parent / "results"
WINDOW_TOKENS = 256
FOUND, LOUDEST = "super experts", "loudest"

Experts = tuple[tuple[int, int], ...]
"""(row among the MoE layers, expert_id) of each."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Zeroed(_Model):
    """The model with some experts zeroed."""

    name: str
    experts: list[tuple[int, int]]
    """(layer_id, expert_id)"""
    routed_share: float
    """Mean share of the calibration tokens that choose them."""
    ppl: Estimate
    kld: Estimate
    """From the whole model, nats per token; errors are those of the mean over tokens."""


class SuperExperts(_Model):
    """benchmarks/results/super_experts-<model>.json"""

    provenance: Provenance
    model: str
    tasks: list[str]
    calibration_tokens: int
    heldout_tokens: int
    num_found: int
    """Experts that the rule finds; with none, the loudest stand in for them."""
    max_output: list[list[float]]
    """[L][E] largest |element| of an expert's output on the calibration text."""
    base_ppl: Estimate
    chosen: Zeroed
    draws: list[Zeroed]
    random_ppl: Estimate
    """Over the draws: mean, and standard error of the mean."""
    random_kld: Estimate


class ZeroPacker:
    """Packs every expert as nothing at all; zero bytes are zero weights in every form."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def pack(self, layer_id: int, expert_id: int, form: str) -> ByteArray:
        """The flat record of an expert whose output is zero."""
        return np.zeros(expert_bytes(form, *self._spec.expert_shape), np.uint8)


def choose(max_output: npt.NDArray[np.float64], count: int) -> tuple[str, Experts]:
    """[L, E] -> (how they were chosen, experts): by the rule, or else the `count` loudest."""
    found = find_super_experts(max_output)
    if found.any():
        return FOUND, _pairs(np.argwhere(found))
    rows = max(1, round(SHARE_OF_LAYERS * len(max_output)))
    order = np.argsort(-max_output[:rows], axis=None, kind="stable")[:count]
    return LOUDEST, _pairs(np.stack(np.unravel_index(order, max_output[:rows].shape), axis=1))


def draw_others(chosen: Experts, num_experts: int, num_draws: int, seed: int = 0) -> list[Experts]:
    """As many experts of the same layers that are not among the chosen, `num_draws` times.

    Raises:
        InputError: a layer has too few others.
    """
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(num_draws):
        drawn: list[tuple[int, int]] = []
        for row in sorted({row for row, _ in chosen}):
            mine = {expert for other, expert in chosen if other == row}
            others = [expert for expert in range(num_experts) if expert not in mine]
            if len(others) < len(mine):
                raise InputError(f"MoE layer {row} has too few other experts: use a lower --count")
            picked = generator.choice(others, len(mine), replace=False)
            drawn += [(row, int(expert)) for expert in sorted(picked)]
        draws.append(tuple(drawn))
    return draws


def zeroed_forms(checkpoint: Checkpoint, experts: Experts) -> list[list[str]]:
    """[L][E] forms for a `VariantScorer` with a `ZeroPacker`: lossy ones are zeroed."""
    spec = checkpoint.spec
    dtypes = checkpoint.expert_dtypes(spec.moe_layer_ids[0], 0)
    whole, packed = ("bf16", "f16") if is_lossless("bf16", dtypes) else ("f32", "bf16")
    forms = [[whole] * spec.num_experts for _ in spec.moe_layer_ids]
    for row, expert_id in experts:
        forms[row][expert_id] = packed
    return forms


def measure(
    model: Path, tasks: Sequence[str], arguments: argparse.Namespace, name: str
) -> SuperExperts:
    """Calibrate, choose, zero, score."""
    checkpoint = Checkpoint(model)
    with TemporaryDirectory(prefix="edge-moe-") as work:
        stats = calibrate(
            model,
            tasks,
            Path(work) / "stats",
            window_tokens=WINDOW_TOKENS,
            max_windows=arguments.calibration_windows,
            forms=(),
            quantiser="nearest",
        )
    how, chosen = choose(stats.max_output, arguments.count)
    sets = {how: chosen}
    for index, draw in enumerate(draw_others(chosen, checkpoint.spec.num_experts, arguments.draws)):
        sets[f"random, draw {index + 1}"] = draw
    tokenizer = load_tokenizer(model)
    windows = [
        window
        for task in tasks
        for window in heldout_windows(task, tokenizer, WINDOW_TOKENS, arguments.windows)
    ]
    scorer = VariantScorer(
        checkpoint, windows, PackedExperts(checkpoint, ZeroPacker(checkpoint.spec))
    )
    scores = scorer.score({each: zeroed_forms(checkpoint, sets[each]) for each in sets})
    rows = [_zeroed(each, sets[each], stats, scores[each]) for each in sets]
    base_nll = scores[how].base_nll
    return SuperExperts(
        provenance=Provenance.published(),
        model=name,
        tasks=list(tasks),
        calibration_tokens=stats.info.num_tokens,
        heldout_tokens=base_nll.size,
        num_found=len(chosen) if how == FOUND else 0,
        max_output=np.round(stats.max_output, 2).tolist(),
        base_ppl=metrics.perplexity(base_nll),
        chosen=rows[0],
        draws=rows[1:],
        random_ppl=metrics.mean_and_error([row.ppl.value for row in rows[1:]]),
        random_kld=metrics.mean_and_error([row.kld.value for row in rows[1:]]),
    )


def _zeroed(name: str, experts: Experts, stats: ExpertStats, scores: TokenScores) -> Zeroed:
    shares = [stats.routed_tokens[pair] / stats.info.num_tokens for pair in experts]
    return Zeroed(
        name=name,
        experts=[(stats.info.moe_layer_ids[row], expert_id) for row, expert_id in experts],
        routed_share=float(np.mean(shares)),
        ppl=metrics.perplexity(scores.nll),
        kld=metrics.mean_and_error(scores.kld),
    )


def _pairs(indices: npt.NDArray[np.int64]) -> Experts:
    """[n, 2] -> pairs."""
    return tuple((int(row), int(expert)) for row, expert in indices)


def show(found: SuperExperts, console: Console) -> None:
    """One row per set of experts, the random ones together."""
    table = Table(box=box.MARKDOWN)
    for heading in ("model", "zeroed (router unchanged)", "experts as layer.expert"):
        table.add_column(heading)
    for heading in ("chosen by tokens", "perplexity", "KLD, nats per token"):
        table.add_column(heading, justify="right")
    table.add_row(found.model, "nothing", "", "", f"{found.base_ppl}", "0")
    names = ", ".join(f"{layer}.{expert}" for layer, expert in found.chosen.experts)
    _add_row(table, found.chosen.name, names, found.chosen)
    draws = f"mean of {len(found.draws)} draws"
    share = float(np.mean([draw.routed_share for draw in found.draws]))
    table.add_row(
        *("", "random, same layers", draws, f"{share:.1%}"),
        *(f"{found.random_ppl}", f"{found.random_kld}"),
    )
    worst = max(found.draws, key=lambda draw: draw.kld.value)
    _add_row(table, "the worst draw", ", ".join(f"{a}.{b}" for a, b in worst.experts), worst)
    console.print(table)
    machine = found.provenance.machine
    console.print(
        f"the rule finds {found.num_found} super experts among "
        f"{sum(map(len, found.max_output))}; {machine.cpu}, {machine.cores} cores"
    )


def _add_row(table: Table, name: str, experts: str, row: Zeroed) -> None:
    table.add_row("", name, experts, f"{row.routed_share:.1%}", f"{row.ppl}", f"{row.kld}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=None, help="default: the demo model")
    parser.add_argument("--task", action="append", help="repeatable; default: all shipped ones")
    parser.add_argument("--count", type=int, default=3, help="loudest to take if none is found")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--windows", type=int, default=4, help="held-out windows per task")
    parser.add_argument("--calibration-windows", type=int, default=36, help="of all tasks together")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    arguments = parser.parse_args()
    name = arguments.model.resolve().name if arguments.model else "demo"
    model = arguments.model or demo_model_dir()
    found = measure(model, arguments.task or task_names(), arguments, name)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"super_experts-{name}.json"
    write_text(path, found.model_dump_json(indent=1) + "\n")
    show(found, Console(width=150))


if __name__ == "__main__":
    main()
