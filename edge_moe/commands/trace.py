"""`edge-moe trace`: which experts the routers choose on real text, for `edge-moe simulate`."""

from __future__ import annotations

from typing import Annotated

import typer

from edge_moe.commands.opening import CommonOptions, open_traceable, runnable_path, tracing
from edge_moe.commands.options import (
    Budget,
    LinearMapFile,
    MaxSequences,
    Model,
    NumSlots,
    Revision,
    SafetensorsOutput,
    Tasks,
    TextWindowTokens,
    stderr,
)
from edge_moe.files import require_file_output, require_suffix


def trace_command(
    model: Model,
    task: Tasks,
    output: SafetensorsOutput,
    window_tokens: TextWindowTokens = 256,
    prompt_tokens: Annotated[
        int, typer.Option(help="Of which so many are a prompt, read at once.")
    ] = 32,
    max_windows: MaxSequences = 16,
    budget: Budget = None,
    slots: NumSlots = None,
    linear_map: LinearMapFile = None,
    revision: Revision = None,
) -> None:
    """Record the routers' choices on held-out text, one token a step as when decoding."""
    path = runnable_path(model, revision)
    require_file_output(output, ".safetensors")
    require_suffix(output, ".safetensors")
    from edge_moe.runtime.evaluate import progress
    from edge_moe.runtime.record_trace import feed, text_windows

    common = CommonOptions(budget, window_tokens, None)
    with open_traceable(path, common, slots, linear_map) as session:
        windows = text_windows(session, task, window_tokens, max_windows)
        with tracing(session, output), progress("text", len(windows)) as advance:
            feed(session, windows, prompt_tokens, advance)
    num_tokens = sum(map(len, windows))
    stderr().print(f"{output}: {num_tokens} tokens in {len(windows)} sequences")
