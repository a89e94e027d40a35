"""MC-MoE's, GEMQ's and edge-moe's program on the same costs: what does each one's freedom buy?

    python benchmarks/programs.py [--task code] [--share 0.14 --share 0.125] [--model DIR]

`edge-moe compare` gives every program its own cost, as published; here all minimise the planner's.
MC-MoE gives every layer the same bits of {1, 2, 3}; GEMQ shares them between layers; edge-moe also
takes other forms and drops experts. Prints the cost that each found, and the KL divergence of its
plan on held-out text that nothing was chosen by, and writes benchmarks/results/programs.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table

from edge_moe.candidates import candidate_forms, full_expert_bytes
from edge_moe.checkpoint import Checkpoint
from edge_moe.compare.record import CompareOptions
from edge_moe.converters.compare_bench import Bench
from edge_moe.demo import demo_model_dir, task_names
from edge_moe.errors import BudgetError, SolverError
from edge_moe.files import write_text
from edge_moe.measurement import Provenance
from edge_moe.metrics import Estimate, mean_and_error
from edge_moe.planner import gather_evidence
from edge_moe.problem import Problem, Solution
from edge_moe.programs import BitForms, gemq, joint, pmq
from edge_moe.rivals import name_forms
from edge_moe.runtime.heldout import REPORT_PART, part_of_heldout
from edge_moe.runtime.tokenizer import load_tokenizer

RESULTS = Path(__file__).resolve().parent / "results" / "programs.json"
SHARES = (0.14, 0.125)
JOINT = "edge-moe"


class Found(BaseModel):
    """One program at one size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    share: float
    program: str
    cost: float
    expert_bytes: int
    kld: Estimate


class Programs(BaseModel):
    """benchmarks/results/programs.json"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provenance: Provenance
    found: list[Found]


def solutions(problem: Problem, forms: Sequence[str]) -> dict[str, Solution]:
    """Every program that finds a choice within the problem's bytes, all for its own `loss`."""
    bit_forms = BitForms.named(forms)
    programs: dict[str, Callable[[], Solution]] = {
        JOINT: lambda: joint(problem),
        "GEMQ": lambda: gemq(problem, problem.loss, bit_forms),
        "MC-MoE": lambda: pmq(problem, problem.loss, bit_forms),
    }
    found = {}
    for name, program in programs.items():
        try:
            found[name] = program()
        except (BudgetError, SolverError) as error:
            Console(stderr=True).print(f"{name}: {error}")
    return found


def measure(bench: Bench, share: float) -> list[Found]:
    """Every program at `share` of the experts' 16-bit bytes."""
    spec, forms = bench.spec, candidate_forms(bench.spec, "native")
    evidence = gather_evidence(
        *(spec, bench.stats, forms, "native", int(share * full_expert_bytes(spec, "native"))),
        gradients=bench.gradients,
    )
    found = solutions(evidence.problem, forms)
    plans = {name: name_forms(each.choice, forms) for name, each in found.items()}
    scores = bench.scorer.score(plans)
    return [
        Found(
            task=bench.task,
            share=share,
            program=name,
            cost=each.loss,
            expert_bytes=each.expert_bytes,
            kld=mean_and_error(scores[name].kld),
        )
        for name, each in found.items()
    ]


def calibrated(model: Path, task: str, work: Path) -> Bench:
    """Calibrate on `task`; plans are measured on all of the half of its text that reports."""
    tokenizer = load_tokenizer(model)
    windows = part_of_heldout([task], tokenizer, REPORT_PART, None)
    return Bench.of(Checkpoint(model), task, work, CompareOptions(), windows, [])


def show(found: Sequence[Found], console: Console) -> None:
    """One row per size and program; costs and KL as multiples of the joint program's."""
    table = Table(box=box.MARKDOWN)
    for heading in ("task", "experts' bytes", "program", "spent"):
        table.add_column(heading)
    for heading in ("cost", "x edge-moe's", "KL", "x edge-moe's"):
        table.add_column(heading, justify="right")
    best: Mapping[tuple[str, float], Found] = {
        (each.task, each.share): each for each in found if each.program == JOINT
    }
    for each in found:
        own = best[each.task, each.share]
        table.add_row(
            *(each.task, f"{each.share:.1%}", each.program),
            f"{each.expert_bytes / own.expert_bytes:.1%}",
            *(f"{each.cost:.3g}", f"{each.cost / own.cost:.2f}"),
            *(f"{each.kld}", f"{each.kld.value / own.kld.value:.2f}"),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Three programs on the same costs.")
    parser.add_argument("--model", type=Path, default=None, help="default: the demo model")
    parser.add_argument("--task", action="append", help="repeatable; default: all shipped tasks")
    parser.add_argument("--share", type=float, action="append", help="repeatable")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    found: list[Found] = []
    for task in args.task or task_names():
        with TemporaryDirectory(prefix="edge-moe-") as work:
            bench = calibrated(args.model or demo_model_dir(), task, Path(work))
            for share in args.share or SHARES:
                found += measure(bench, share)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    record = Programs(provenance=Provenance.published(), found=found)
    write_text(args.output, record.model_dump_json(indent=1) + "\n")
    show(found, Console(width=140))


if __name__ == "__main__":
    main()
