"""`edge-moe upcycle`: a dense model becomes a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from edge_moe.commands.opening import runnable_path
from edge_moe.commands.options import DeviceName, Revision
from edge_moe.commands.upcycle_add import AddOptions, add_command
from edge_moe.commands.upcycle_split import SplitOptions, split_command
from edge_moe.errors import InputError
from edge_moe.flags import flag
from edge_moe.units import MAX_SEED


class ActivationsName(StrEnum):
    """What experts' inputs are rounded to in training."""

    FLOAT = "float"
    INT8 = "int8"


class TrainName(StrEnum):
    """What learns."""

    ROUTED = "routed"
    ALL_MOE = "all-moe"
    ROUTERS = "routers"


WhereToTrain = Annotated[
    DeviceName | None,
    typer.Option(
        "--device", help="Where to train; else cuda where there is one.", show_default=False
    ),
]
_ADDING = (
    *("ternary", "group", "activations", "kl_weight", "lm_weight", "balance_weight"),
    "checkpointing",
)
"""Options, as the function calls them, that --split has nothing for."""
_LEARNING = ("train", "batch", "learning_rate", "device")
"""Those that are about steps."""
_READING = ("data", "seq", "max_windows")
"""Those about text, which --split reads without steps, too."""


def upcycle_command(
    context: typer.Context,
    dense: Annotated[
        str,
        typer.Argument(
            metavar="DENSE",
            help="Llama-, Mistral-, Qwen2- or Qwen3-style checkpoint folder, .gguf file, or hub id "
            "such as HuggingFaceTB/SmolLM2-135M.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="New folder to write.", show_default=False)
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Text to learn from: a shipped task, or a .jsonl or .txt file, a fifth of which "
            "is held out. Repeat for several.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        bool,
        typer.Option(
            "--split",
            help="No new weights: the dense layer's neurons become a shared expert of those that "
            "matter most and experts of what fires together.",
        ),
    ] = False,
    expert_width: Annotated[
        int | None,
        typer.Option(
            help="With --split: neurons of an expert; else a quarter is left to the shared one.",
            show_default=False,
        ),
    ] = None,
    experts: Annotated[int, typer.Option(min=1, help="Routed experts per layer.")] = 4,
    top_k: Annotated[int, typer.Option(min=1, help="Routed experts per token.")] = 1,
    ternary: Annotated[
        bool,
        typer.Option(
            "--ternary",
            help="Train experts of -1, 0 and 1 that pack without loss; else full-precision ones.",
        ),
    ] = False,
    group: Annotated[
        int,
        typer.Option(min=1, help="Weights per ternary scale: 256 packs into tq1_0, 64 into q2_0."),
    ] = 256,
    activations: Annotated[
        ActivationsName,
        typer.Option(help="Round experts' inputs, as engines that multiply integers do."),
    ] = ActivationsName.FLOAT,
    train: Annotated[
        TrainName,
        typer.Option(
            help="Routed experts and routers, or shared experts too. With --split routers alone, "
            "or (default) all, norms as well."
        ),
    ] = TrainName.ROUTED,
    steps: Annotated[
        int,
        typer.Option(min=0, help="Optimiser steps; 0 (--split: the default) learns nothing."),
    ] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 4,
    seq: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    max_windows: Annotated[
        int | None, typer.Option(min=2, help="Use at most this many windows.", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float, typer.Option("--lr", help="Peak learning rate, for --split 3e-4.")
    ] = 1e-3,
    kl_weight: Annotated[
        float, typer.Option(help="Weight of the divergence from the dense model.")
    ] = 0.0,
    lm_weight: Annotated[float, typer.Option(help="Weight of the next-token loss.")] = 1.0,
    balance_weight: Annotated[
        float, typer.Option(help="Weight of the penalty for an uneven choice of experts.")
    ] = 0.01,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Less memory for a third more time.")
    ] = False,
    tied: Annotated[
        bool,
        typer.Option(
            "--tied",
            help="Keep a tied output matrix tied. Smaller; llama.cpp's own converter then writes a "
            "file that it cannot load, `edge-moe build --target gguf` one that it can.",
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Start of the routers, order of the text.")
    ] = 0,
    device: WhereToTrain = None,
    revision: Revision = None,
) -> None:
    """Add routed experts to a dense model, which stays as the shared expert. Resumes after a kill.

    With --split its feed-forward layers are taken apart instead, and it learns again what it was.
    transformers, llama.cpp and every command here take the folder like any other Qwen2-MoE (or
    GLM-4-MoE, where queries and keys are normalised).
    """
    given = {name for name in context.params if _is_given(context, name)}
    if split:
        _require_split(given, train, steps if "steps" in given else 0)
        parts = SplitOptions(
            *(experts, top_k, expert_width, steps if "steps" in given else None, batch, seq),
            *(max_windows, learning_rate if "learning_rate" in given else None),
            routers_only=train is TrainName.ROUTERS,
            seed=seed,
            tied=tied,
            device=device,
        )
        split_command(runnable_path(dense, revision), data or [], output, parts, dense)
        return
    if expert_width is not None or train is TrainName.ROUTERS:
        raise InputError("--expert-width and --train routers are for --split: add it")
    _require_adding(given, steps, is_ternary=ternary)
    added = AddOptions(
        experts=experts,
        top_k=top_k,
        ternary=ternary,
        group=group,
        steps=steps,
        batch=batch,
        seq=seq,
        max_windows=max_windows,
        learning_rate=learning_rate,
        kl_weight=kl_weight,
        lm_weight=lm_weight,
        balance_weight=balance_weight,
        has_int8_activations=activations is ActivationsName.INT8,
        trains_shared=train is TrainName.ALL_MOE,
        is_checkpointing=checkpointing,
        seed=seed,
        tied=tied,
        device=device,
    )
    add_command(dense, revision, data or [], output, added)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _flags(names: Sequence[str], given: set[str]) -> str:
    """Those of the options `names` that are `given`, as they are typed."""
    return ", ".join(flag(name) for name in names if name in given)


def _require_adding(given: set[str], steps: int, *, is_ternary: bool) -> None:
    """Refuse what has no meaning without --split.

    Raises:
        InputError: names the options.
    """
    if "group" in given and not is_ternary:
        raise InputError("--group is about the scales of ternary experts: add --ternary")
    adding = [name for name in _ADDING if name not in ("ternary", "group")]
    idle = _flags((*_READING, *_LEARNING, *adding), given)
    if idle and not steps:
        raise InputError(f"--steps 0 learns nothing: leave out {idle}, or raise --steps")


def _require_split(given: set[str], train: TrainName, steps: int) -> None:
    """Refuse what --split has nothing for, or not without steps.

    Raises:
        InputError: names the options.
    """
    found = [_flags(_ADDING, given)] if _flags(_ADDING, given) else []
    if "train" in given and train is TrainName.ROUTED:
        found.append("--train routed")
    if found:
        raise InputError(
            f"--split adds no experts, but takes the dense layers apart: leave out "
            f"{', '.join(found)}"
        )
    idle = _flags(_LEARNING, given)
    if idle and not steps:
        raise InputError(f"--split without steps learns nothing: leave out {idle}, or add --steps")
