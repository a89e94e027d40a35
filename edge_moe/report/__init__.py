"""The report: verdict, memory, frontier, experts, quality, speed; one HTML file or a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def write_report(folder: Path, output: Path) -> None:
    """Write one offline HTML file about the artefact in `folder`.

    Raises:
        InputError: `folder` holds no plan.json.
        MissingExtraError: jinja2 or plotly is not installed.
    """
    from edge_moe.files import write_text
    from edge_moe.report.data import load_report
    from edge_moe.report.page import render_page

    page = render_page(load_report(folder))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)


def print_report(folder: Path, console: Console) -> None:
    """The same facts, as at most some forty lines of text.

    Raises:
        InputError: `folder` holds no plan.json.
    """
    from edge_moe.report.data import load_report
    from edge_moe.report.terminal import print_facts

    print_facts(load_report(folder), console)
