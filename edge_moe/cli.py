"""The command line. Every command is a thin function in `edge_moe.commands`; work is imported late.

`--help`, `inspect`, `plan` and `report` never import torch.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

import edge_moe
from edge_moe.commands.build import build_command
from edge_moe.commands.calibrate import calibrate_command
from edge_moe.commands.calibrate_skipping import calibrate_skipping_command
from edge_moe.commands.compare import compare_command
from edge_moe.commands.delta import delta_command
from edge_moe.commands.demo import demo_command
from edge_moe.commands.evaluate import eval_command
from edge_moe.commands.fit_guesses import fit_guesses_command
from edge_moe.commands.fit_pre_gate import fit_pre_gate_command
from edge_moe.commands.inspect import inspect_command
from edge_moe.commands.patterns import patterns_command
from edge_moe.commands.plan import plan_command
from edge_moe.commands.recover import recover_command
from edge_moe.commands.report import report_command
from edge_moe.commands.run import run_command
from edge_moe.commands.simulate import simulate_command
from edge_moe.commands.stats import stats_app
from edge_moe.commands.trace import trace_command
from edge_moe.commands.transform import transform_command
from edge_moe.commands.upcycle import upcycle_command
from edge_moe.errors import EdgeMoeError, install_command
from edge_moe.files import os_problem

EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""As a shell counts a program that SIGPIPE ended: whoever read the output had enough."""

_EXTRAS = {
    "gguf": "gguf",
    "llama_cpp": "gguf",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxruntime_genai": "genai",
    "optimum": "optimum",
    "pynvml": "cuda",
    "triton": "cuda",
    "jinja2": "report",
    "plotly": "report",
}
"""Importable module -> the extra that installs it."""
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning OpenMP threads starve each other on a busy machine
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
}
_NO_SPACE_IN_RUST = "(os error 28)"  # how safetensors spells ENOSPC

app = typer.Typer(
    help="Fit a Mixture-of-Experts model into a memory budget, run it there, show every byte.",
    epilog="Exit codes: 0 fine, 2 bad usage or input, 3 does not fit.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _app_options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"edge-moe {edge_moe.__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        context.fail("Missing command.")


app.command("inspect")(inspect_command)
app.command("calibrate")(calibrate_command)
app.add_typer(stats_app, name="stats")
app.command("calibrate-skipping")(calibrate_skipping_command)
app.command("patterns")(patterns_command)
app.command("transform")(transform_command)
app.command("plan")(plan_command)
app.command("build")(build_command)
app.command("recover")(recover_command)
app.command("delta")(delta_command)
app.command("upcycle")(upcycle_command)
app.command("run")(run_command)
app.command("trace")(trace_command)
app.command("fit-guesses")(fit_guesses_command)
app.command("fit-pre-gate")(fit_pre_gate_command)
app.command("simulate")(simulate_command)
app.command("eval")(eval_command)
app.command("compare")(compare_command)
app.command("report")(report_command)
app.command("demo")(demo_command)


def prepare_environment() -> None:
    """Set what libraries read from the environment, before they are imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def main() -> None:
    """Run `sys.argv` and exit with the command's code."""
    prepare_environment()
    sys.exit(run(sys.argv[1:] or ["--help"]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors become one line on stderr."""
    try:
        code = app(list(arguments), prog_name="edge-moe", standalone_mode=False) or 0
        sys.stdout.flush()
        return code
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise  # rich and typer turn a broken pipe into SystemExit(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit
        return EXIT_BROKEN_PIPE
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except Exception as error:
        if os.environ.get("EDGE_MOE_DEBUG"):
            traceback.print_exc()
        message, exit_code = explain(error)
        print(f"error: {message}", file=sys.stderr)
        return exit_code


def explain(error: Exception) -> tuple[str, int]:
    """(one line that names the thing, the value and the remedy; exit code) for any exception."""
    if isinstance(error, EdgeMoeError):
        return _one_line(str(error)), error.exit_code
    if isinstance(error, TyperException):
        return _explain_usage(error), EXIT_USAGE
    if _NO_SPACE_IN_RUST in str(error):
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and missing.split(".")[0] != edge_moe.__name__:
        return _explain_missing_module(missing), EXIT_USAGE
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{os_problem(error)}", EXIT_USAGE
    if isinstance(error, MemoryError):
        return "out of memory: free some, or use a smaller model or context", EXIT_USAGE
    name = type(error).__name__
    return (
        f"internal error, {name}: {_one_line(str(error))} "
        "(EDGE_MOE_DEBUG=1 shows where; please report it)",
        EXIT_INTERNAL,
    )


def _explain_usage(error: TyperException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "edge-moe"
    message = _one_line(error.format_message()).rstrip(".")
    for kind in ("integer", "number"):  # the words of the validation library
        jargon = f"Input should be a valid {kind}, unable to parse string as an? {kind}"
        message = re.sub(jargon, f"not a valid {kind}", message)
    return f"{message}: see `{command} --help`"


def _explain_missing_module(name: str) -> str:
    package = name.split(".")[0]
    extra = _EXTRAS.get(package)
    remedy = install_command(extra) if extra else "pip install edge-moe"
    return f"this needs the package {package!r}, which is not installed: {remedy}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
