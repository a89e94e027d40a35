"""`edge-moe demo`: the whole loop on the embedded model, command by command.

Every step is one `edge-moe` command in a process of its own: the command that is shown is the
command that runs. A demo that was stopped goes on where it was; finished steps are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.text import Text

from edge_moe import __version__
from edge_moe.checkpoint import Checkpoint
from edge_moe.demo import demo_model_dir, task_dir, task_names
from edge_moe.demo.full_bill import CONTEXT_TOKENS, budget_for_share, require_possible
from edge_moe.errors import EdgeMoeError, InputError, install_command
from edge_moe.files import write_text
from edge_moe.measurement import RunMeasurement, load_evals
from edge_moe.package import is_package
from edge_moe.plan import Plan
from edge_moe.reproduce import RAW_HINT, command_line, prompt_options

DEFAULT_OUTPUT = Path("edge-moe-demo")
DEFAULT_TASK = "code"
SHARE = 0.15
"""Share of the experts' 16-bit bytes that the default budget leaves them."""
SEARCH_SECONDS = 30
NEW_TOKENS = 96
TEMPERATURE = 0.7
SEED = 1
MAX_WINDOWS = 12
MAX_PROBLEMS = 100
_BUDGET_STEP_BYTES = 100_000


class _Settings(BaseModel):
    """What must agree before an earlier demo in the same folder may be continued."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    edge_moe_version: str
    model_fingerprint: str
    task: str
    budget_bytes: int


@dataclass(frozen=True)
class Demo:
    """Paths and settings of one demo."""

    folder: Path
    model: Path
    task: str
    budget_bytes: int
    console: Console

    @property
    def stats(self) -> Path:
        return self.folder / "stats"

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def package(self) -> Path:
        return self.folder / "small"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def full_run(self) -> Path:
        return self.folder / "run-full.json"

    @property
    def small_run(self) -> Path:
        return self.folder / "run-small.json"

    @cached_property
    def prompt(self) -> str:
        about = json.loads((task_dir(self.task) / "task.json").read_text(encoding="utf-8"))
        return str(about["examples"][0])

    @property
    def has_problems(self) -> bool:
        return (task_dir(self.task) / "problems.jsonl").exists()


def run_demo(
    work: Path = DEFAULT_OUTPUT,
    task: str = DEFAULT_TASK,
    budget_bytes: int | None = None,
    *,
    console: Console | None = None,
) -> Path:
    """Run every step in the folder `work`, print the summary, and return the path of the report.

    Without `budget_bytes`, the budget leaves `SHARE` of their 16-bit bytes to the experts.

    Raises:
        InputError: unknown task, or a folder that holds something else.
        BudgetError: no plan can fit.
        StepError: a step failed; its own message is on stderr.
    """
    from edge_moe.demo.summary import print_summary, summarise

    if task not in task_names():
        raise InputError(f"no demo task is called {task!r}; known tasks: {', '.join(task_names())}")
    start = time.perf_counter()
    console = console or Console(highlight=False)
    demo = Demo(work, demo_model_dir(), task, budget_bytes or default_budget(), console)
    require_possible(Checkpoint(demo.model), demo.budget_bytes)
    _prepare_folder(demo)
    for step in (_inspect, _calibrate, _plan, _build, _run_both, _evaluate, _report):
        step(demo)
    print_summary(summarise(demo), console)
    console.print(f"{time.perf_counter() - start:.0f} s in all; everything is in {work}")
    run_it = command_line("run", demo.package, *prompt_options(Plan.load(demo.plan)))
    console.print(f"next: {run_it}\n  ({RAW_HINT})", markup=False, soft_wrap=True)
    return demo.report


def default_budget() -> int:
    """The budget that leaves `SHARE` of their 16-bit bytes to the experts, rounded to 0.1 MB."""
    exact = budget_for_share(Checkpoint(demo_model_dir()), SHARE, CONTEXT_TOKENS)
    return math.ceil(exact / _BUDGET_STEP_BYTES) * _BUDGET_STEP_BYTES


def _prepare_folder(demo: Demo) -> None:
    settings = _Settings(
        edge_moe_version=__version__,
        model_fingerprint=Checkpoint(demo.model).fingerprint,
        task=demo.task,
        budget_bytes=demo.budget_bytes,
    )
    path = demo.folder / "demo.json"
    text = settings.model_dump_json(indent=1) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    if demo.folder.exists() and any(demo.folder.iterdir()):
        raise InputError(
            f"{demo.folder} holds something else, or a demo with other settings: "
            "choose another --output or remove it"
        )
    demo.folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _inspect(demo: Demo) -> None:
    _headline(demo, "1. What is in the model", "from file headers only")
    _command(demo, "inspect", demo.model)


def _calibrate(demo: Demo) -> None:
    _headline(demo, f"2. Watch the experts work on {demo.task}", "layer by layer")
    _unless(
        (demo.stats / "stats.json").exists(),
        lambda: _command(demo, "calibrate", demo.model, "--task", demo.task, "-o", demo.stats),
        demo,
    )


def _plan(demo: Demo) -> None:
    _headline(demo, "3. Choose the form of every expert", f"at most {_budget_text(demo)} in all")
    place = ("--ctx", CONTEXT_TOKENS, "--device", "cpu")
    options = (*place, "--search-seconds", SEARCH_SECONDS, "-o", demo.plan)
    arguments = (demo.model, "--stats", demo.stats, "--budget", _budget_text(demo), *options)
    _unless(demo.plan.exists(), lambda: _command(demo, "plan", *arguments), demo)


def _build(demo: Demo) -> None:
    _headline(demo, "4. Build the smaller model", "one contiguous record per expert")
    _unless(
        is_package(demo.package),
        lambda: _command(demo, "build", demo.plan, "-o", demo.package),
        demo,
    )


def _run_both(demo: Demo) -> None:
    _headline(demo, "5. Run the full model and the smaller one", "each in a process of its own")
    _run(demo, demo.full_run, demo.model)
    _run(demo, demo.small_run, demo.package, "--budget", _budget_text(demo), "--record")


def _run(demo: Demo, record: Path, model: Path, *options: object) -> None:
    if record.exists():
        demo.console.print("[dim]already done[/]")
        return
    prompt = ("--prompt", demo.prompt, "--raw", "--max-new-tokens", NEW_TOKENS)
    sampling = () if demo.has_problems else ("--temperature", TEMPERATURE, "--seed", SEED)
    place = ("--ctx", CONTEXT_TOKENS, "--device", "cpu")
    arguments = (model, *options, *place, *prompt, *sampling, "--json")
    output = _command(demo, "run", *arguments, is_captured=True)
    measured = RunMeasurement.model_validate_json(output)
    write_text(record, output)
    speed = f"{measured.tokens_per_second:.1f} tokens per second"
    peak = f"peak {measured.peak_memory_bytes / 1e6:.1f} MB"
    demo.console.print(f"{measured.generated_tokens} tokens, {speed}, {peak}")


def _evaluate(demo: Demo) -> None:
    _headline(demo, "6. Measure the quality on held-out text", "on the task, and off it")
    others = [name for name in task_names() if name != demo.task]
    tasks = [option for name in (demo.task, *others) for option in ("--task", name)]
    problems = MAX_PROBLEMS if demo.has_problems else 0
    limits = ("--max-windows", MAX_WINDOWS, "--max-problems", problems, "--record")
    found = {result.task for result in load_evals(demo.package)}
    _unless(
        found >= set(task_names()),
        lambda: _command(demo, "eval", demo.package, "--against", demo.model, *tasks, *limits),
        demo,
    )


def _report(demo: Demo) -> None:
    _headline(demo, "7. Explain where every byte went", "estimate beside measurement")
    missing = [name for name in ("jinja2", "plotly") if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        remedy = install_command("report")
        demo.console.print(f"no HTML report: {names} not installed ({remedy})", markup=False)
        _command(demo, "report", demo.package)
        return
    _command(demo, "report", demo.package, "-o", demo.report)


def _headline(demo: Demo, title: str, detail: str) -> None:
    demo.console.print(f"\n[bold]{title}[/] [dim]({detail})[/]")


def _unless(is_done: bool, work: Callable[[], object], demo: Demo) -> None:
    if is_done:
        demo.console.print("[dim]already done[/]")
    else:
        work()


def _budget_text(demo: Demo) -> str:
    """The budget as an option's value, exactly: 412.3MB."""
    megabytes, rest = divmod(demo.budget_bytes, _BUDGET_STEP_BYTES)
    return f"{demo.budget_bytes}B" if rest else f"{megabytes // 10}.{megabytes % 10}MB"


def _command(demo: Demo, verb: str, *arguments: object, is_captured: bool = False) -> str:
    """Show and run `edge-moe verb arguments`; its stdout, if captured.

    Raises:
        StepError: the command failed.
    """
    line = [verb, *(str(argument) for argument in arguments)]
    demo.console.print(Text(f"$ edge-moe {shlex.join(line)}", style="cyan"), soft_wrap=True)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "edge_moe", *line], stdout=output if is_captured else None
        )
        try:
            process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        output.seek(0)
        text = output.read()
    if process.returncode < 0:
        raise EdgeMoeError(
            f"`edge-moe {verb}` was killed by signal {-process.returncode}: free some memory if it "
            "is 9, and start the demo again to go on"
        )
    if process.returncode:
        raise StepError(verb, process.returncode)
    return text


class StepError(EdgeMoeError):
    """A step of the demo failed; it has already said why. Ends the demo with the same exit code."""

    def __init__(self, verb: str, exit_code: int) -> None:
        super().__init__(f"`edge-moe {verb}` ended with exit code {exit_code}")
        self.exit_code = exit_code
