"""`edge-moe stats`: join the shards of a calibration, look at one, hand one to llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_moe.commands.options import Json, Output, stderr, stdout

stats_app = typer.Typer(
    help="Join the shards of a calibration, look at one, or hand one to llama.cpp."
)


@stats_app.command("merge")
def merge_command(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New statistics folder.")],
    inputs: Annotated[list[Path], typer.Argument(metavar="IN...", help="Two or more shards.")],
) -> None:
    """Join shards: bit for bit what one run over all their windows gives."""
    from edge_moe.errors import InputError
    from edge_moe.files import require_new_output
    from edge_moe.gradient_stats import merge_gradients
    from edge_moe.moments import merge_moments
    from edge_moe.stats import ExpertStats

    if len(inputs) < 2:
        raise InputError(f"only {inputs[0]} is given to merge: name two or more folders")
    require_new_output(output)
    merged = ExpertStats.load(inputs[0])
    for folder in inputs[1:]:
        merged = merged.merge(ExpertStats.load(folder))
    gradients = merge_gradients(inputs)
    if gradients is not None:
        gradients.info.require_same_run(merged.info)
    merge_moments(inputs, output, merged.info.moe_layer_ids)
    if gradients is not None:
        gradients.save(output)
    merged.save(output)
    info = merged.info
    stderr().print(
        f"{output}: {info.num_tokens:,} tokens in {len(info.windows)} of {info.num_windows} windows"
    )


@stats_app.command("show")
def show_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Statistics folder.")],
    json: Json = False,
) -> None:
    """Show what was measured, and how the tokens spread over each layer's experts."""
    from edge_moe.gradient_stats import load_gradients
    from edge_moe.stats import ExpertStats
    from edge_moe.stats_table import print_stats, summarise_stats

    stats = ExpertStats.load(folder)
    summary = summarise_stats(stats, load_gradients(folder, stats.info))
    if json:
        print(summary.model_dump_json(indent=1))
        return
    print_stats(summary, stdout())


@stats_app.command("imatrix")
def imatrix_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Statistics folder.")],
    output: Output = Path("imatrix.gguf"),
) -> None:
    """Write an importance matrix of the routed experts, for llama.cpp's llama-quantize."""
    from edge_moe.converters.imatrix import write_imatrix

    path = write_imatrix(folder, output)
    stderr().print(f"{path}: use it as `llama-quantize --imatrix {path} IN.gguf OUT.gguf TYPE`")
