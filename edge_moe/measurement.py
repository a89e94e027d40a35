"""What was measured, where and by which command: JSON that the report puts beside the plan.

PACKAGE/measurements/run-<time>.json      RunMeasurement, written by `run --record`
PACKAGE/measurements/eval-<task>.json     EvalResult, written by `eval --record`
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from edge_moe import __version__
from edge_moe.demo import task_names
from edge_moe.errors import InputError
from edge_moe.files import write_text
from edge_moe.json_files import checked, read_json
from edge_moe.metrics import Comparison, Estimate
from edge_moe.plan import MemoryTerm

MEASUREMENT_VERSION = 1
MEASUREMENTS_FOLDER = "measurements"
_PACKAGES = ("torch", "transformers", "numpy", "llama-cpp-python", "onnxruntime", "onnxruntime-gpu")

RecoveryKind = Literal["1 / perplexity", "exact match"]
ModelKind = Literal["package", "checkpoint", "gguf", "onnx"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Machine(_Model):
    """The computer that a number was measured on."""

    cpu: str
    cores: int
    """Cores this process may use."""
    ram_bytes: int
    os: str
    python: str
    packages: dict[str, str]
    """Installed versions of the packages that do the arithmetic."""
    accelerator: str = ""
    """Name of the GPU that was used, or empty."""


class Provenance(_Model):
    """Enough to repeat a measurement."""

    command: str
    """The command line, ready to paste into a shell."""
    folder: str = ""
    """Where it was run; relative paths in it start there."""
    time: datetime
    edge_moe_version: str
    machine: Machine
    seed: int | None = None
    """Seed of sampling; None when nothing was drawn at random."""

    @classmethod
    def here(cls, *, seed: int | None = None, accelerator: str = "") -> Provenance:
        """This process, now."""
        return cls(
            command=this_command(),
            folder=str(Path.cwd()),
            time=datetime.now(UTC).replace(microsecond=0),
            edge_moe_version=__version__,
            machine=this_machine(accelerator),
            seed=seed,
        )

    @classmethod
    def published(cls) -> Provenance:
        """This process, now, for a file that leaves this machine, where the folder says nothing."""
        return cls.here().without_folder()

    def without_folder(self) -> Self:
        """The same for a file that leaves this machine."""
        return self.model_copy(update={"folder": ""})


class _Record(_Model):
    """A measurement file."""

    version: int = MEASUREMENT_VERSION
    provenance: Provenance

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read one file.

        Raises:
            InputError: missing, damaged, or written by another version.
        """
        what, again = f"measurement {path}", "remove it and measure again"
        missing = f"{what} does not exist: write one with `run --record` or `eval --record`"
        raw = read_json(path, InputError, missing=missing, damaged=again)
        return checked(raw, cls, what, versions=(MEASUREMENT_VERSION,), again=again)

    def _save(self, folder: Path, name: str) -> Path:
        path = folder / MEASUREMENTS_FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self.model_dump_json(indent=1) + "\n")
        return path


class RunMeasurement(_Record):
    """One `edge-moe run`: what was planned, what was used, how fast."""

    model: str
    """The MODEL argument."""
    model_kind: ModelKind
    device: str
    budget_bytes: int | None
    """None: no budget was given."""
    context_tokens: int
    terms: list[MemoryTerm]
    """What the memory was planned to hold under this budget."""
    host_terms: list[MemoryTerm] = Field(default_factory=list)
    """What is kept in RAM beside the slots, which the budget does not count."""
    measured_terms: dict[str, int] = Field(default_factory=dict)
    """Bytes really taken, for those terms that can be told apart; keyed by the term's name.

    The runtime's is that of the probe, a process with next to no model.
    """
    cached_tokens: int = 0
    """Tokens in the KV cache when it was measured."""
    peak_memory_bytes: int
    """Peak of the whole process: VmHWM on CPU, torch's allocator on CUDA."""
    prompt_tokens: int
    generated_tokens: int
    load_seconds: float
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float
    """Generated tokens per second of decoding."""
    paging: dict[str, float] = Field(default_factory=dict)
    """The fields of the runtime's PagingStatistics, by name."""
    graphs: str = ""
    """Whether the dense part was replayed from CUDA graphs, and why not; empty on a CPU."""
    misses: str = ""
    """What was done with experts that had no slot, where some may have been computed elsewhere."""
    kernels: str = ""
    """Whose kernels computed the experts: `ggml`, `exact` or both; empty for other runtimes."""
    pre_gate: str = ""
    """What chose the experts in place of the routers, and how well it agrees with them."""
    text: str = ""
    """What was generated, to be looked at."""

    @property
    def planned_bytes(self) -> int:
        return sum(term.num_bytes for term in self.terms)

    def save(self, folder: Path) -> Path:
        """Write `folder`/measurements/run-<time>.json; returns its path."""
        stamp = self.provenance.time.strftime("%Y%m%dT%H%M%SZ")
        return self._save(folder, f"run-{stamp}-{os.getpid()}.json")


class SkippingCost(_Model):
    """What a skipping rule left of the work, over tokens that were scored or replayed."""

    rule: str
    routed_per_token: float
    """Experts that the routers chose per token, over all MoE layers."""
    active_per_token: float
    """... and that were computed."""
    active_parameters: float
    """Weights that a token uses on average: its experts and the dense part, a tied lm_head once."""
    routed_bytes_per_token: float
    """Packed bytes of the chosen experts: what decoding one token reads."""
    saved_bytes_per_token: float
    """... of which skipping saves this much."""

    @property
    def active_bytes_per_token(self) -> float:
        """Packed bytes of the experts that are computed."""
        return self.routed_bytes_per_token - self.saved_bytes_per_token

    @property
    def saved_share(self) -> float:
        """Saved bytes as a share of those of all chosen experts; 0.0 where none was chosen."""
        routed = self.routed_bytes_per_token
        return self.saved_bytes_per_token / routed if routed else 0.0


class StallCost(_Model):
    """How tokens that were scored got the experts that were not in memory."""

    mode: Literal["exact", "bounded", "never"]
    allowed_seconds: float | None
    """Of waiting per token, under `bounded`."""
    bytes_per_second: float | None
    """What a second was taken to read; None where that was measured."""
    is_repeatable: bool
    """Whether bodies were read between layers, so that results do not depend on time."""
    hit_rate: float
    shadow_experts_per_token: float
    """Misses that were computed from shadows, over all MoE layers."""
    shadow_share: float
    """Share of the tokens' router weight that they had."""
    page_in_bytes_per_token: float
    stall_seconds_per_token: float


class EvalResult(_Record):
    """The quality of one model on one task, alone or against a reference."""

    model: str
    model_kind: ModelKind
    against: str | None
    task: str
    in_task: bool | None
    """Whether the model was shrunken for this task; None when its plan is not known."""
    delta: str | None = None
    """The task delta that was added to the model."""
    budget_bytes: int | None = None
    kernels: str = ""
    """Whose kernels computed the experts: `ggml`, `exact` or both; empty for other runtimes."""
    pre_gate: str = ""
    """What chose the experts in place of the routers, and how well it agrees with them."""
    window_tokens: int
    num_windows: int
    num_search_windows: int = 0
    """Held-out windows left out, for the plan was chosen by them."""
    num_tokens: int
    """Scored tokens: all but the first of every window."""
    perplexity: Estimate
    base_perplexity: Estimate | None = None
    comparison: Comparison | None = None
    num_problems: int = 0
    exact_match: Estimate | None = None
    """Share of the task's problems solved, where it has problems; see `metrics.exact_match`."""
    base_exact_match: Estimate | None = None
    recovery_of: RecoveryKind | None = None
    """The score that `recovery_percent` compares."""
    recovery_percent: float | None = None
    """100 x score / reference score: exact match where there is one, else 1 / perplexity."""
    recovery_error_percent: float | None = None
    """Its standard error, paired: both models read the same tokens and solve the same problems."""
    skipping: SkippingCost | None = None
    """Where a skipping rule was in force."""
    stall: StallCost | None = None
    """Where it was said how long a token may wait for experts."""
    seconds: float

    @property
    def recovery(self) -> Estimate | None:
        """`recovery_percent` with its error bar."""
        if self.recovery_percent is None:
            return None
        return Estimate(self.recovery_percent, self.recovery_error_percent or 0.0)

    def save(self, folder: Path) -> Path:
        """Write `folder`/measurements/eval-<task>.json; returns its path.

        Files of one name are told apart by a hash of where they lie.
        """
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(self.task).stem) or "task"
        if self.task not in task_names():
            where = Path(self.provenance.folder) / self.task
            name += f"-{hashlib.sha256(os.path.abspath(where).encode()).hexdigest()[:8]}"
        return self._save(folder, f"eval-{name}.json")


def load_runs(folder: Path) -> list[RunMeasurement]:
    """Every recorded run of the package in `folder`, oldest first."""
    paths = sorted((folder / MEASUREMENTS_FOLDER).glob("run-*.json"))
    return sorted(map(RunMeasurement.load, paths), key=lambda run: run.provenance.time)


def load_evals(folder: Path) -> list[EvalResult]:
    """Every recorded evaluation of the package in `folder`; the plan's own tasks come first."""
    paths = sorted((folder / MEASUREMENTS_FOLDER).glob("eval-*.json"))
    return sorted(map(EvalResult.load, paths), key=lambda result: not result.in_task)


def this_command() -> str:
    """The running command line, with `edge-moe` for the ways in which it can be started."""
    program = Path(sys.argv[0])
    if program.stem in ("__main__", "edge-moe", "edge_moe"):
        return shlex.join(["edge-moe", *sys.argv[1:]])
    return shlex.join([program.name or "python", *sys.argv[1:]])


def this_machine(accelerator: str = "") -> Machine:
    """Describe the computer without importing any of the packages named."""
    return Machine(
        cpu=_cpu_model(),
        cores=usable_cores(),
        ram_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        packages={name: found for name in _PACKAGES if (found := _installed(name))},
        accelerator=accelerator,
    )


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
