"""`edge-moe report`: the plan beside what was measured."""

from __future__ import annotations

import dataclasses
import json as json_library
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_moe.commands.options import Json, stderr, stdout


def report_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `edge-moe build` wrote.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write an HTML file too.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Explain where every byte went, planned beside measured: here, and as one HTML file."""
    from edge_moe.files import require_file_output
    from edge_moe.report import print_report, write_report

    if output is not None:
        require_file_output(output, ".html", makes_folder=True)
    if json:
        print(json_library.dumps(report_facts(folder), indent=1))
    else:
        print_report(folder, stdout())
    if output is not None:
        write_report(folder, output)
        stderr().print(f"{output}: open it in a browser; it needs no network")


def report_facts(folder: Path) -> dict[str, Any]:
    """What the report shows, for programs: plan, planned beside measured terms, measurements."""
    from edge_moe.package import PLAN_NAME
    from edge_moe.plan_table import summarise_plan
    from edge_moe.report.data import load_report

    data = load_report(folder)
    return {
        "folder": str(folder),
        "plan": summarise_plan(data.plan, folder / PLAN_NAME).model_dump(mode="json"),
        "terms": [dataclasses.asdict(row) | {"error": row.error} for row in data.term_rows()],
        "run": data.run.model_dump(mode="json") if data.run else None,
        "evals": [result.model_dump(mode="json") for result in data.evals],
        "commands": data.commands(),
    }
