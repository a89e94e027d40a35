"""Rendering `ReportData` as one offline HTML file: plotly.js is inlined, nothing is fetched."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from edge_moe.errors import MissingExtraError
from edge_moe.report import charts, facts
from edge_moe.report.data import ReportData
from edge_moe.units import format_bytes


def render_page(data: ReportData) -> str:
    """The whole page. About 5 MB, nearly all of it plotly.js.

    Raises:
        MissingExtraError: jinja2 or plotly is not installed.
    """
    environment = _environment()
    template = environment.from_string(
        files("edge_moe.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    )
    safe = environment.filters["safe"]
    figures = {
        "bill": charts.memory_bill(data),
        "waterfall": charts.expert_waterfall(data),
        "frontier": charts.frontier(data),
        "forms": charts.expert_forms(data),
        "saliency": charts.expert_saliency(data),
    }
    if len(facts.search_table(data)) >= 2:  # one plan is no comparison
        figures["search"] = charts.search_trials(data)
    rendered = {name: safe(_fragment(figure, name)) for name, figure in figures.items()}
    page: str = template.render(
        **_context(data),
        charts=rendered,
        plotly_script=safe(_plotly_script()),
        embedded_json=safe(_script_json(data)),
    )
    return page


def _context(data: ReportData) -> dict[str, Any]:
    plan = data.plan
    return {
        "title": facts.title(data),
        "verdict": facts.verdict(data),
        "facts": facts.headline(data),
        "terms": facts.term_table(data),
        "has_run": data.run is not None,
        "record_command": facts.record_command(data),
        "eval_command": facts.eval_command(data),
        "loss_unit": plan.loss_unit[:1].upper() + plan.loss_unit[1:],
        "forms": [
            {
                "label": charts.form_label(row.form),
                "count": row.count,
                "share": f"{row.count / sum(map(len, plan.forms)):.0%}",
                "num_bytes": format_bytes(row.num_bytes),
            }
            for row in data.form_rows
        ],
        "tasks": ", ".join(plan.tasks),
        "quality": facts.quality_table(data),
        "problems": facts.problem_table(data),
        "trials": facts.search_table(data),
        "search_line": facts.search_line(data),
        "speed": facts.speed_table(data),
        "contexts": facts.context_table(data),
        "remarks": [*plan.limits, *plan.warnings],
        "commands": data.commands(),
        "provenance": facts.provenance(data),
    }


def _environment() -> Any:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise MissingExtraError("jinja2", "report", "the HTML report") from None
    return Environment(autoescape=True, undefined=StrictUndefined)


def _plotly_script() -> str:
    charts.graph_objects()  # the error that names the extra
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script


def _fragment(figure: Any, name: str) -> str:
    fragment: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"chart-{name}",
        config={"displayModeBar": False, "responsive": True},
    )
    return fragment


def _script_json(data: ReportData) -> str:
    """Plan and measurements as JSON that cannot end its <script> element early."""
    document = {
        "plan": data.plan.model_dump(mode="json"),
        "run": data.run.model_dump(mode="json") if data.run else None,
        "evals": [result.model_dump(mode="json") for result in data.evals],
    }
    return json.dumps(document).replace("<", "\\u003c")
