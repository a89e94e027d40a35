"""Options of `edge-moe run` that no other command has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_moe.commands.options import DeviceName
from edge_moe.units import parse_bytes

PromptText = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        help="Message for the chat template, or with --raw text to continue; without it a "
        "chat starts.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Stop after this many tokens.")]
Temperature = Annotated[
    float, typer.Option("--temperature", help="0 always takes the likeliest token.")
]
TopP = Annotated[float, typer.Option("--top-p", help="Sample from this share of probability.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of sampling.")]
StopTexts = Annotated[
    list[str] | None,
    typer.Option("--stop", help="Stop at this text. Repeat for several.", show_default=False),
]
Raw = Annotated[
    bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
]
WhereToRun = Annotated[
    DeviceName | None,
    typer.Option(
        "--device",
        help="Where to run; else cuda where there is one, an ONNX folder where it was planned for.",
        show_default=False,
    ),
]
RamBytes = Annotated[
    int | None,
    typer.Option(
        "--ram",
        parser=parse_bytes,
        metavar="SIZE",
        help="With a GPU: RAM for experts that are not on the device.",
        show_default=False,
    ),
]
Prefetch = Annotated[
    bool | None,
    typer.Option(
        "--prefetch/--no-prefetch",
        help="Read the next layer's experts early, or never. Both are tried, and what is "
        "faster stays, unless this says.",
        show_default=False,
    ),
]
PredictorNames = Annotated[
    list[str] | None,
    typer.Option(
        "--predictor",
        metavar="NAME",
        help="Who guesses them: router (the next one's), wide (twice as many), repeat, "
        "transitions, token, or linear (with --linear-map). Repeat for several, which are "
        "tried by turns; else router, wide, and linear where there is a map.",
        show_default=False,
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="Load only this task's experts; auto finds the task of the prompt.",
        show_default=False,
    ),
]
PatternsFolder = Annotated[
    Path | None,
    typer.Option(
        "--patterns", help="Folder of task patterns; else the shipped ones.", show_default=False
    ),
]
Graphs = Annotated[
    bool | None,
    typer.Option(
        "--graphs/--no-graphs",
        help="On CUDA: replay the dense part of a token from captured graphs. Both are tried, "
        "and the faster one stays, unless this says.",
        show_default=False,
    ),
]
GpuLayers = Annotated[
    int | None,
    typer.Option(
        "--gpu-layers",
        help="Of a .gguf: all but the experts of so many layers on the GPU, with a llama.cpp "
        "that was built for one.",
        show_default=False,
    ),
]
Rearranged = Annotated[
    bool,
    typer.Option(
        "--rearranged",
        help="On a CPU: compute experts of q4_0, q4_k and the like faster. Of a package they are "
        "rearranged when they are read; of a .gguf once, into a copy in the cache folder that "
        "takes as much disk.",
    ),
]
TraceFile = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Write down every expert that the router chose, for `edge-moe simulate`.",
        show_default=False,
    ),
]
Record = Annotated[
    bool, typer.Option("--record", help="Keep the measurement inside MODEL, for the report.")
]
