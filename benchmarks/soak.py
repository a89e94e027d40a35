"""Both engines under a budget that pages, asked for an hour, with disk errors: does anything grow?

    python benchmarks/soak.py [--minutes 60] [--model FILE.gguf] [--engines gguf native] [--write]

Each engine gets its share of the time in a process of its own, in a memory cgroup (v1) of 1.05 x
the budget where one can be made. It answers greedy, sampled and cancelled prompts of up to the
whole context and chats of several turns; sessions are closed and opened again; reads of experts
fail, and files are replaced, truncated and written to. Without --model, both run the embedded demo
model with experts at about half their bytes, built here. Exit status 1 if a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from memory_cgroup import enter, memory_cgroup, missing_reason
from rich.console import Console
from rich.table import Table
from soak_faults import EXPECTED
from soak_verdicts import Ending, Fault, Run, Sample, Verdict, max_map_count, verdicts

from edge_moe.demo import demo_model_dir, task_names
from edge_moe.errors import BudgetError
from edge_moe.files import write_text
from edge_moe.gguf_model import GgufModel
from edge_moe.measurement import Provenance
from edge_moe.plan import Plan
from edge_moe.tasks import load_task_texts

WORKER = Path(__file__).with_name("soak_worker.py")
RESULTS = Path(__file__).parent / "results"
CGROUP_MARGIN = 1.05
ENGINES = ("gguf", "native")
PLANNED_SHARE = 0.5
"""Of the experts' 16-bit bytes, for the model that is built here."""
RESIDENT_SHARE = 0.3
"""Of its experts' bytes, beyond the smallest budget that works."""
TEXT_CHARS = 40_000
"""Of each shipped task's held-out text."""


def built(engine: str, folder: Path) -> Path:
    """The demo model for an engine, made by the commands that a user has."""
    model, stats, target = demo_model_dir(), folder / "stats", engine
    if not stats.exists():
        options = ("--max-windows", 8, "--forms", "q4_k,q8_0", "--quantiser", "nearest")
        _command("calibrate", model, "--task", "code", *options, "-o", stats)
    whole, plan = folder / f"whole-{target}.json", folder / f"plan-{target}.json"
    place = ("--stats", stats, "--target", target, "--no-search")
    _command("plan", model, *place, "--budget", "10GB", "-o", whole)
    found = Plan.load(whole)
    left = found.total_bytes - int((1 - PLANNED_SHARE) * found.term("experts").num_bytes)
    _command("plan", model, *place, "--budget", f"{left}B", "-o", plan)
    output = folder / f"model-{target}"
    _command("build", plan, "-o", output)
    return next(output.glob("*.gguf")) if engine == "gguf" else output


def _command(*arguments: object) -> None:
    command = [sys.executable, "-m", "edge_moe", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"edge-moe {arguments[0]}: {done.stderr[-2000:]}")


def expert_bytes(engine: str, model: Path) -> int:
    """Of all experts, as they are stored."""
    if engine == "gguf":
        layers = GgufModel(model).layers.values()
        return sum(info.num_bytes for layer in layers for info in layer.stacks)
    return sum(path.stat().st_size for path in model.glob("experts-*.safetensors"))


def smallest_budget(engine: str, model: Path, context_tokens: int | None) -> int:
    """As the engine says when it is given too little."""
    from edge_moe.runtime.gguf_session import GgufSession
    from edge_moe.runtime.session import Session

    session: Any = GgufSession if engine == "gguf" else Session
    try:
        session.open(model, budget_bytes=1, context_tokens=context_tokens).close()
    except BudgetError as error:
        return error.minimum_bytes
    raise RuntimeError("a budget of one byte was accepted")


def write_prompts(path: Path) -> Path:
    """Held-out text of every shipped task, one after the other."""
    texts = ("\n\n".join(load_task_texts(task, "heldout"))[:TEXT_CHARS] for task in task_names())
    write_text(path, "\n\n".join(texts))
    return path


def soak(
    engine: str,
    model: Path,
    text: Path,
    *,
    seconds: float,
    every_seconds: float,
    context_tokens: int,
    console: Console | None = None,
    worker: Path = WORKER,
) -> Run:
    """Run one engine; what its process reported."""
    total_bytes = expert_bytes(engine, model)
    budget_bytes = smallest_budget(engine, model, context_tokens)
    budget_bytes += int(RESIDENT_SHARE * total_bytes)
    limit_bytes = int(CGROUP_MARGIN * budget_bytes)
    found: dict[str, list[Any]] = {"sample": [], "fault": [], "ending": []}
    can_limit = missing_reason() is None
    with (
        TemporaryDirectory(prefix="edge-moe-soak-") as folder,
        memory_cgroup(limit_bytes) if can_limit else nullcontext() as group,
    ):
        numbers = (budget_bytes, context_tokens, seconds, every_seconds)
        command = [sys.executable, worker, engine, model, text, folder, *numbers]
        errors = Path(folder) / "stderr"
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                [str(each) for each in command],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                preexec_fn=lambda: enter(group),
            )
            for line in process.stdout or ():
                for kind, content in json.loads(line).items():
                    found[kind].append(content)
                    if console is not None:
                        console.print(engine, kind, json.dumps(content), soft_wrap=True)
            code = process.wait()
        failure = f"exit status {code}: {errors.read_text()[-2000:]}" if code else ""
    return Run(
        engine=engine,
        budget_bytes=budget_bytes,
        cgroup_bytes=None if group is None else limit_bytes,
        context_tokens=context_tokens,
        expert_bytes=total_bytes,
        max_map_count=max_map_count(),
        fault_kinds=list(EXPECTED),
        samples=[Sample(**each) for each in found["sample"]],
        faults=[Fault(**each) for each in found["fault"]],
        ending=None if failure else next((Ending(**each) for each in found["ending"]), None),
        failure=failure,
    )


def table(found: list[Verdict]) -> Table:
    """One row per claim."""
    shown = Table("engine", "claim", "seen", "limit", "")
    for each in found:
        shown.add_row(each.engine, each.claim, each.seen, each.limit, "ok" if each.holds else "NO")
    return shown


def keep(run: Run) -> None:
    """Write a run with its verdicts."""
    content = {
        "provenance": Provenance.published().model_dump(mode="json"),
        "verdicts": [each.model_dump() for each in verdicts(run)],
        "run": run.model_dump(),
    }
    write_text(RESULTS / f"soak-{run.engine}.json", json.dumps(content, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="of all engines together")
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the demo model's")
    parser.add_argument("--engines", nargs="*", default=ENGINES, choices=ENGINES)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two samples")
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument(
        "--write", action="store_true", help="keep each run in results/soak-ENGINE.json"
    )
    arguments = parser.parse_args()
    console, runs = Console(stderr=True), []
    with TemporaryDirectory(prefix="edge-moe-soak-") as folder:
        text = write_prompts(Path(folder) / "prompts.txt")
        for engine in arguments.engines:
            model = arguments.model if engine == "gguf" else None
            runs.append(
                soak(
                    engine,
                    model or built(engine, Path(folder)),
                    text,
                    seconds=60 * arguments.minutes / len(arguments.engines),
                    every_seconds=arguments.every,
                    context_tokens=arguments.ctx,
                    console=console,
                )
            )
            if arguments.write:
                keep(runs[-1])
    found = [each for run in runs for each in verdicts(run)]
    Console(width=150).print(table(found))
    return 0 if all(each.holds for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
