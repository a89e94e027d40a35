"""`edge-moe build`: turn a plan into an artefact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_moe.commands.options import Shadow, TargetName, resumable, stderr

if TYPE_CHECKING:
    from edge_moe.plan import Plan


def build_command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json of `edge-moe plan`.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="New folder to write.", show_default=False)
    ],
    target: Annotated[
        TargetName | None,
        typer.Option(help="Build something else than the plan's own target.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The model, where it has moved since.", show_default=False),
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            help="The plan's statistics: what a .gguf file's experts are packed by where the plan "
            "gives them other types.",
            show_default=False,
        ),
    ] = None,
    shadow: Shadow = None,
    onnx_exact: Annotated[
        bool,
        typer.Option(
            "--onnx-exact",
            help="Target onnx: 4-bit experts with float32 activations, slower on a CPU.",
        ),
    ] = False,
    onnx_standard: Annotated[
        bool,
        typer.Option(
            "--onnx-standard",
            help="Target onnx: also write model_standard.onnx, without contrib operations.",
        ),
    ] = False,
) -> None:
    """Build what a plan says, streaming. A killed build resumes by running it again."""
    from edge_moe.errors import PlanError
    from edge_moe.hub import is_hub_id, resolve_model
    from edge_moe.onnx_folder import OnnxOptions
    from edge_moe.plan import Plan
    from edge_moe.units import format_bytes

    loaded = Plan.load(plan)
    if model is None and not (is_hub_id(loaded.model) or Path(loaded.model).exists()):
        raise PlanError(
            f"the model of plan {plan} is not at {loaded.model} any more: say where with --model"
        )
    folder = resolve_model(model or loaded.model)
    from edge_moe.converters.build import build

    options = OnnxOptions(onnx_exact, onnx_standard)
    with resumable():
        path = build(
            loaded,
            output,
            model=folder,
            target=target.value if target else None,
            stats=stats,
            onnx=options if options != OnnxOptions() else None,
            shadow=shadow,
        )
    num_bytes = sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    console = stderr()
    console.print(f"{path}: {format_bytes(num_bytes)}")
    console.print(f"next: {_next_command(path, target.value if target else loaded.target, loaded)}")


def _next_command(path: Path, target: str, plan: Plan) -> str:
    from edge_moe.reproduce import RAW_HINT, command_line, prompt_options

    if target in ("native", "onnx"):
        return f"{command_line('run', path, *prompt_options(plan))}\n  ({RAW_HINT})"
    artefact = path / "model.gguf" if target == "gguf" else path
    tasks = [part for task in plan.tasks for part in ("--task", task)]
    return command_line("eval", artefact, "--against", plan.model, *tasks)
