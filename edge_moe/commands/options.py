"""Arguments and flags that several commands share, and where they print."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from edge_moe.errors import InputError
from edge_moe.units import parse_bytes, parse_tokens

if TYPE_CHECKING:
    from edge_moe.runtime.skipping import SkipRule
    from edge_moe.runtime.stalls import StallOptions

_PLAIN_WIDTH = 110  # columns when nobody's terminal sets them, as in a pipe or a file
_TABLE_WIDTH = 190  # a Markdown table in a pipe keeps its rows whole


class TargetName(StrEnum):
    """The values of `edge_moe.plan.Target`."""

    NATIVE = "native"
    GGUF = "gguf"
    HF = "hf"
    ONNX = "onnx"


class DeviceName(StrEnum):
    """The values of `edge_moe.plan.Device`."""

    CPU = "cpu"
    CUDA = "cuda"


class KernelsName(StrEnum):
    """The values of `edge_moe.runtime.kernel_choice.Kernels`."""

    AUTO = "auto"
    EXACT = "exact"
    GGML = "ggml"
    TRITON = "triton"


class MissesName(StrEnum):
    """The values of `edge_moe.runtime.fetch_choice.Misses`."""

    AUTO = "auto"
    FETCH = "fetch"
    CPU = "cpu"


class StallName(StrEnum):
    """The values of `edge_moe.runtime.stalls.Stall`."""

    EXACT = "exact"
    BOUNDED = "bounded"
    NEVER = "never"


def _model(kinds: str) -> Any:
    """The argument MODEL of a command that takes `kinds`, and hub ids."""
    text = f"{kinds}, or hub id such as Qwen/Qwen3-30B-A3B."
    return typer.Argument(metavar="MODEL", help=text, show_default=False)


Model = Annotated[str, _model("Checkpoint folder, native package, .gguf file")]
EvaluatedModel = Annotated[
    str, _model("Checkpoint folder, native package, ONNX folder, .gguf file")
]
RunnableModel = Annotated[str, _model("Checkpoint folder, native package, .gguf file, ONNX folder")]
SourceModel = Annotated[str, _model("Hugging Face checkpoint folder")]
CalibratedModel = Annotated[str, _model("Hugging Face checkpoint folder, .gguf file")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Tasks = Annotated[
    list[str],
    typer.Option(
        "--task",
        help="Shipped task, or a .jsonl or .txt file, a fifth of which is held out. Repeat for "
        "several.",
        show_default=False,
    ),
]
Budget = Annotated[
    int | None,
    typer.Option(
        "--budget",
        parser=parse_bytes,
        metavar="SIZE",
        help="Hard limit on memory: 12GB, 500MB, 8GiB.",
        show_default=False,
    ),
]
NumSlots = Annotated[
    int | None,
    typer.Option(
        "--slots", help="Experts in memory at once, instead of a budget.", show_default=False
    ),
]
ContextTokens = Annotated[
    int | None,
    typer.Option(
        "--ctx",
        parser=parse_tokens,
        metavar="TOKENS",
        help="Context length: 8k or 8192.",
        show_default=False,
    ),
]
Skip = Annotated[
    str | None,
    typer.Option(
        "--skip",
        metavar="RULE",
        help="Leave out light experts: odp, naee or top-p=0.8.",
        show_default=False,
    ),
]
SkipCalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--skip-calibration",
        metavar="FILE",
        help="Medians for odp and naee, from `edge-moe calibrate-skipping`.",
        show_default=False,
    ),
]
LinearMapFile = Annotated[
    Path | None,
    typer.Option(
        "--linear-map",
        metavar="FILE",
        help="What guesses the next layer's experts, from `edge-moe fit-guesses`.",
        show_default=False,
    ),
]
PreGateFile = Annotated[
    Path | None,
    typer.Option(
        "--pre-gate",
        metavar="FILE",
        help="What chooses the experts of all layers but the first ahead, in place of their "
        "routers, from `edge-moe fit-pre-gate`.",
        show_default=False,
    ),
]
Kernels = Annotated[
    KernelsName | None,
    typer.Option(
        "--kernels",
        help="Whose kernels compute experts: exact is torch, on unpacked weights; ggml is "
        "llama.cpp's, on packed weights on a CPU, faster and rounded as there; triton computes "
        "packed weights on CUDA; auto (default) is ggml or triton for quantised experts where "
        "they are installed.",
        show_default=False,
    ),
]
Stall = Annotated[
    StallName | None,
    typer.Option(
        "--stall",
        help="What a token does about experts that are not in memory: exact (default) waits for "
        "them; never computes them from their shadows; bounded waits for those that matter most, "
        "up to --stall-seconds. A prompt always waits.",
        show_default=False,
    ),
]
StallSeconds = Annotated[
    float | None,
    typer.Option(
        "--stall-seconds",
        metavar="SECONDS",
        help="With --stall bounded: time per token to wait for experts, default 0.01.",
        show_default=False,
    ),
]
StallRate = Annotated[
    int | None,
    typer.Option(
        "--stall-rate",
        parser=parse_bytes,
        metavar="SIZE",
        help="With --stall bounded: what a second reads, so that numbers repeat; else as fast as "
        "the slots were filled.",
        show_default=False,
    ),
]
Shadow = Annotated[
    str | None,
    typer.Option(
        "--shadow",
        metavar="FORM",
        help="Target native: beside every expert a second copy in this ternary form, for `run "
        "--stall never` and `bounded`: tq2_0 (recommended), tq1_0 (smallest), q2_0 (for rows that "
        "are no multiple of 256).",
        show_default=False,
    ),
]
Misses = Annotated[
    MissesName | None,
    typer.Option(
        "--misses",
        help="With --ram: experts that the GPU lacks are fetched, or computed on the CPU; auto "
        "(default) measures both and keeps what is faster, which can change last digits.",
        show_default=False,
    ),
]
Delta = Annotated[
    Path | None,
    typer.Option(
        "--delta",
        metavar="FILE",
        help="A task to add to the model, from `edge-moe delta`; MODEL is the base that it was "
        "made for, or a package built from it.",
        show_default=False,
    ),
]
SearchSeconds = Annotated[
    float,
    typer.Option(
        "--search-seconds", min=1, help="Time for the search, once its first plan is measured."
    ),
]
DEFAULT_SEARCH_SECONDS = 240.0
Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write.")]
SafetensorsOutput = Annotated[
    Path, typer.Option("--output", "-o", help="Where to write, a .safetensors file.")
]
TextWindowTokens = Annotated[
    int, typer.Option("--window-tokens", help="Tokens of text before a new sequence begins.")
]
MaxSequences = Annotated[
    int, typer.Option("--max-windows", help="Sequences in all, of all tasks by turns.")
]


def stdout() -> Console:
    """Results go here."""
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    return Console(width=width, highlight=False, markup=False)


def wide_stdout() -> Console:
    """For tables that are Markdown where nobody watches."""
    width = None if sys.stdout.isatty() else _TABLE_WIDTH
    return Console(width=width, highlight=False, markup=False)


def stderr() -> Console:
    """Progress, statistics and hints go here."""
    width = None if sys.stderr.isatty() else _PLAIN_WIDTH
    return Console(stderr=True, width=width, highlight=False, markup=False)


@contextmanager
def resumable() -> Iterator[None]:
    """Around work that goes on where it was stopped: Ctrl-C says how."""
    try:
        yield
    except KeyboardInterrupt:
        stderr().print("stopped: run the same command again to resume")
        raise


def skip_rule(skip: str | None, calibration: Path | None, model: Path) -> SkipRule | None:
    """The rule that --skip names, or None.

    Raises:
        InputError: an unknown rule, a missing calibration, or one that nothing uses.
        StatsError: a calibration of another model.
    """
    if skip is None:
        if calibration is not None:
            raise InputError(
                f"--skip-calibration {calibration} is given without --skip: add a rule"
            )
        return None
    from edge_moe.runtime.skipping import load_skip

    return load_skip(skip, calibration, model)


def stall_options(
    stall: StallName | None,
    seconds: float | None,
    rate: int | None = None,
    *,
    is_repeatable: bool = False,
) -> StallOptions | None:
    """What --stall and its companions say; None where nothing was said.

    Raises:
        InputError: companions without --stall bounded, or values that mean nothing.
    """
    if stall is not StallName.BOUNDED and (seconds is not None or rate is not None):
        name = "--stall-seconds" if rate is None else "--stall-rate"
        raise InputError(f"{name} is for --stall bounded: add that, or leave it out")
    if stall is None:
        return None
    from edge_moe.runtime.stalls import StallOptions

    return StallOptions(stall.value, seconds, rate, is_repeatable)


def check_delta(delta: Path | None, *, is_recorded: bool) -> None:
    """Raise InputError where a model with a delta would be recorded as the model itself."""
    if delta is not None and is_recorded:
        raise InputError(
            f"--record keeps what MODEL does inside it, and with --delta {delta} it is another "
            "model: leave out --record, and keep what --json prints"
        )


def parse_shard(text: str) -> tuple[int, int]:
    """`"0/4"` -> (0, 4): the first of four shards.

    Raises:
        InputError: not i/N with 0 <= i < N.
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"shard {text!r} is not understood: write i/N with 0 <= i < N, as in 0/4")
    return int(index), int(count)


def parse_names(text: str) -> tuple[str, ...]:
    """`"q8_0, drop"` -> ("q8_0", "drop").

    Raises:
        InputError: no name at all.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise InputError(f"list of names {text!r} is empty: write for example drop,q4_0,q8_0")
    return names
