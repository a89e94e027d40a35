"""`edge-moe fit-guesses`: a linear map that guesses the next layer's experts, for paging."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_moe.commands.opening import CommonOptions, open_traceable, runnable_path
from edge_moe.commands.options import (
    Budget,
    MaxSequences,
    NumSlots,
    Revision,
    SafetensorsOutput,
    Tasks,
    TextWindowTokens,
    stderr,
)
from edge_moe.errors import TargetError
from edge_moe.files import require_file_output, require_suffix
from edge_moe.open_model import is_gguf_file
from edge_moe.units import parse_bytes

if TYPE_CHECKING:
    from edge_moe.runtime.session import Session


FittedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Checkpoint folder, native package, or hub id such as Qwen/Qwen3-30B-A3B.",
        show_default=False,
    ),
]


@contextmanager
def open_fittable(
    model: str, revision: str | None, output: Path, common: CommonOptions, slots: int | None
) -> Iterator[Session]:
    """The model that something is to be fitted for and written to `output`.

    Raises:
        TargetError: a .gguf file or an ONNX folder, which routes by itself.
        InputError: an output that cannot be written, or slots beside a budget.
    """
    path = runnable_path(model, revision)
    require_file_output(output, ".safetensors")
    require_suffix(output, ".safetensors")
    if is_gguf_file(path):
        raise TargetError(
            f"{path} runs in llama.cpp: give the checkpoint or package that it was made from"
        )
    from edge_moe.runtime.session import Session

    with open_traceable(path, common, slots) as session:
        assert isinstance(session, Session)
        yield session


def fit_guesses_command(
    model: FittedModel,
    task: Tasks,
    output: SafetensorsOutput,
    window_tokens: TextWindowTokens = 256,
    max_windows: MaxSequences = 64,
    ridge: Annotated[
        float,
        typer.Option(help="Weight of the penalty, as a share of the inputs' variance.", min=0),
    ] = 0.01,
    memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="For sums over the text, which is read again for layers that do not fit; else "
            "1 GB.",
            show_default=False,
        ),
    ] = None,
    budget: Budget = None,
    slots: NumSlots = None,
    revision: Revision = None,
) -> None:
    """Fit a map from each MoE layer's input to what the next router ranks by, on a task's text."""
    common = CommonOptions(budget, window_tokens, None)
    with open_fittable(model, revision, output, common, slots) as session:
        from edge_moe.runtime.evaluate import progress
        from edge_moe.runtime.fit_linear import LIMIT_BYTES, fit_linear, passes, require_states
        from edge_moe.tasks import task_windows

        require_states(session.spec)
        windows = task_windows(task, "calibration", session.tokenizer, window_tokens, max_windows)
        limit_bytes = memory or LIMIT_BYTES
        rounds = len(passes(session.spec, limit_bytes))
        with progress("text", len(windows) * rounds) as advance:
            linear = fit_linear(
                *(session, windows, task), ridge=ridge, limit_bytes=limit_bytes, advance=advance
            )
    linear.save(output)
    shares = " ".join(f"{share:.0%}" for share in linear.info.explained)
    stderr().print(f"{output}: fitted on {linear.info.num_tokens} tokens")
    stderr().print(f"explained of the next router, by layer: {shares}")
