"""Charts of the report, as plotly figures. Pure functions of `ReportData`; no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edge_moe.errors import MissingExtraError
from edge_moe.formats import DROP, form_bits, in_order
from edge_moe.formats import form_label as plain_label
from edge_moe.units import format_bytes

if TYPE_CHECKING:
    from edge_moe.report.data import ReportData, TermRow

TERM_COLOURS = {
    "dense weights": "#1e3a8a",
    "experts": "#2563eb",
    "shadows": "#93c5fd",
    "KV cache": "#16a34a",
    "workspace": "#f59e0b",
    "runtime": "#cbd5e1",
}
INK, MUTED, BUDGET_COLOUR = "#1f2937", "#94a3b8", "#dc2626"
# darker means more bits, each form has its own; a dropped expert is paper with a cross
FORM_COLOURS = {
    DROP: "#f5f5f4",
    "tq1_0": "#e6f0ff",
    "tq2_0": "#dbeafe",
    "q2_0": "#cfe3fe",
    "int2_b64": "#c7defe",
    "q2_k": "#bfdbfe",
    "int2_b32": "#b4d5fe",
    "q3_k": "#93c5fd",
    "q4_0": "#70aefb",
    "q4_k": "#68a9fb",
    "int4_b64": "#60a5fa",
    "int4_b32": "#559ffa",
    "q5_k": "#4c94f8",
    "q6_k": "#3b82f6",
    "int8_row": "#2d6cf0",
    "q8_0": "#2563eb",
    "f16": "#21429c",
    "bf16": "#1e3a8a",
    "f32": "#0f172a",
}


def graph_objects() -> Any:
    """plotly.graph_objects, imported when a chart is drawn.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        import plotly.graph_objects
    except ImportError:
        raise MissingExtraError("plotly", "report", "the HTML report") from None
    return plotly.graph_objects


def form_label(form: str) -> str:
    """`q4_k` -> `4-bit (q4_k)`; `drop` -> `dropped`."""
    return plain_label(form) if form == DROP else f"{plain_label(form)} ({form})"


def form_colour(form: str) -> str:
    """The colour of `form`, or of the known form with the nearest bits."""
    if form in FORM_COLOURS:
        return FORM_COLOURS[form]
    kept = [known for known in FORM_COLOURS if known != DROP]
    return FORM_COLOURS[min(kept, key=lambda known: abs(form_bits(known) - form_bits(form)))]


def expert_waterfall(data: ReportData) -> Any:
    """From the experts at 16 bits to the experts as they are stored. Megabytes."""
    go = graph_objects()
    steps = data.waterfall()
    figure = go.Figure(
        go.Waterfall(
            x=[f"{step.label}<br><b>{format_bytes(step.num_bytes)}</b>" for step in steps],
            y=[step.num_bytes / 1e6 for step in steps],
            measure=[step.kind for step in steps],
            connector={"line": {"color": MUTED, "width": 1}},
            decreasing={"marker": {"color": "#16a34a"}},
            increasing={"marker": {"color": "#93c5fd"}},
            totals={"marker": {"color": "#2563eb"}},
            hovertemplate="%{x}<extra></extra>",
        )
    )
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(tickangle=0)
    return _finish(figure, y_title="MB", height=340)


def memory_bill(data: ReportData) -> Any:
    """Stacked bars of planned terms: all of them, and the model's own on a scale of their own.

    The upper one has the budget and the measured peak. Megabytes.
    """
    rows = [row for row in data.term_rows() if not row.is_total]
    own = [row for row in rows if row.name != "runtime"]
    figure = _bars([rows, own])
    lines = [(data.budget_bytes, "budget", BUDGET_COLOUR, "top left", "dash")]
    if data.peak_memory_bytes is not None:
        lines.append((data.peak_memory_bytes, "measured peak", INK, "bottom left", "dot"))
    for num_bytes, name, colour, position, dash in lines:
        label = {"text": f"{name} {format_bytes(num_bytes)}", "font": {"color": colour}}
        figure.add_vline(
            x=num_bytes / 1e6,
            row=1,
            col=1,
            line={"color": colour, "dash": dash, "width": 2},
            annotation={**label, "yanchor": "bottom"},
            annotation_position=position,
        )
    longest = max([*(line[0] for line in lines), sum(row.planned_bytes for row in rows)])
    figure.update_xaxes(range=[0, 1.03 * longest / 1e6], row=1, col=1)
    figure = _finish(figure, x_title=None, legend=True, height=400)
    figure.update_xaxes(title="MB, the process in all", row=1, col=1)
    figure.update_xaxes(title="MB, all but the runtime", row=2, col=1)
    return figure.update_layout(
        barmode="stack",
        bargap=0.4,
        legend={"y": -0.32, "traceorder": "normal"},
        margin={"l": 20, "t": 40, "b": 110},
    )


def _bars(groups: Sequence[Sequence[TermRow]]) -> Any:
    """One subplot below the other, each a single stacked bar; the first names the colours."""
    go = graph_objects()
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=len(groups), cols=1, vertical_spacing=0.35)
    for number, rows in enumerate(groups, start=1):
        for row in rows:
            bar = go.Bar(
                y=["planned"],
                x=[row.planned_bytes / 1e6],
                name=f"{row.name} {format_bytes(row.planned_bytes)}",
                orientation="h",
                showlegend=number == 1,
                marker={"color": TERM_COLOURS.get(row.name, MUTED)},
                hovertemplate="%{fullData.name}<extra></extra>",
            )
            figure.add_trace(bar, row=number, col=1)
    figure.update_yaxes(showticklabels=False)
    return figure


def search_trials(data: ReportData) -> Any:
    """KL divergence of every plan that was measured, the best on top."""
    go = graph_objects()
    search = data.plan.search
    trials = sorted(search.trials if search else [], key=lambda trial: trial.kld, reverse=True)
    chosen = search.chosen if search else ""
    figure = go.Figure(
        go.Scatter(
            x=[trial.kld for trial in trials],
            y=[trial.name for trial in trials],
            mode="markers",
            marker={
                "size": 10,
                "color": [BUDGET_COLOUR if t.name == chosen else "#2563eb" for t in trials],
            },
            hovertemplate="%{y}: %{x:.4g}<extra></extra>",
        )
    )
    figure.update_yaxes(showticklabels=False, type="category")
    figure.update_xaxes(rangemode="tozero")
    return _finish(figure, x_title="KL divergence, nats per token", height=240)


def frontier(data: ReportData) -> Any:
    """Predicted loss against the size of the experts, with rivals of equal bytes."""
    go = graph_objects()
    every = sorted(data.plan.frontier, key=lambda point: point.expert_bytes)
    points = [point for point in every if point.loss > 0]  # a log axis has no zero
    figure = go.Figure(
        go.Scatter(
            x=[point.expert_bytes / 1e6 for point in points],
            y=[point.loss for point in points],
            mode="lines+markers",
            name="best plan at each size",
            line={"color": "#2563eb", "width": 2},
            hovertemplate="%{x:.3g} MB of experts, loss %{y:.4g}<extra></extra>",
        )
    )
    symbols = ("x", "diamond", "square", "triangle-up", "star", "cross", "pentagon")
    for index, rival in enumerate(data.plan.rivals):
        figure.add_trace(
            go.Scatter(
                x=[rival.expert_bytes / 1e6],
                y=[rival.loss],
                mode="markers",
                name=rival.name,
                marker={"symbol": symbols[index % len(symbols)], "size": 11},
            )
        )
    figure.add_trace(
        go.Scatter(
            x=[data.plan.term("experts").num_bytes / 1e6],
            y=[data.plan.loss],
            mode="markers",
            name="this plan",
            marker={"size": 16, "color": BUDGET_COLOUR, "symbol": "circle-open", "line_width": 3},
        )
    )
    figure.update_yaxes(type="log", exponentformat="power")
    lossless = [point.expert_bytes for point in every if point.loss <= 0]
    if lossless:
        figure.add_vline(
            x=min(lossless) / 1e6,
            line={"color": MUTED, "dash": "dot", "width": 1.5},
            annotation={"text": f"no loss from {format_bytes(min(lossless))} on"},
            annotation_position="top left",
        )
    return _finish(figure, x_title="experts, MB", y_title="predicted loss (log)", legend=True)


def expert_forms(data: ReportData) -> Any:
    """Layers x experts, coloured by form: darker means more bits, a cross means dropped."""
    used = in_order(form for row in data.plan.forms for form in row)
    codes = [[used.index(form) for form in row] for row in data.plan.forms]
    figure = _grid(
        data,
        values=codes,
        scale=_steps([form_colour(form) for form in used]),
        hover=[
            [_expert_hover(data, layer, expert) for expert in range(len(row))]
            for layer, row in enumerate(data.plan.forms)
        ],
        marks=[["x" if form == DROP else "" for form in row] for row in data.plan.forms],
    )
    figure.update_traces(
        zmin=-0.5,
        zmax=len(used) - 0.5,
        colorbar={
            "tickvals": list(range(len(used))),
            "ticktext": [form_label(form) for form in used],
            "outlinewidth": 0,
        },
    )
    return figure


def expert_saliency(data: ReportData) -> Any:
    """Layers x experts: the share of the layer's loss that dropping the expert would cost."""
    figure = _grid(
        data,
        values=data.plan.saliency,
        scale="Oranges",
        hover=[
            [_expert_hover(data, layer, expert) for expert in range(len(row))]
            for layer, row in enumerate(data.plan.forms)
        ],
        marks=[["x" if form == DROP else "" for form in row] for row in data.plan.forms],
    )
    figure.update_traces(zmin=0, colorbar={"title": "share", "outlinewidth": 0})
    return figure


def _expert_hover(data: ReportData, layer: int, expert: int) -> str:
    plan = data.plan
    return (
        f"layer {plan.moe_layer_ids[layer]}, expert {expert}<br>"
        f"{form_label(plan.forms[layer][expert])}<br>"
        f"saliency {plan.saliency[layer][expert]:.1%} of the layer<br>"
        f"chosen by {plan.routed_share[layer][expert]:.1%} of routed tokens"
    )


def _grid(
    data: ReportData, *, values: Any, scale: Any, hover: list[list[str]], marks: list[list[str]]
) -> Any:
    go = graph_objects()
    plan = data.plan
    few = len(plan.forms[0]) <= 40  # a cross per cell stays readable up to here
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=list(range(len(plan.forms[0]))),
            y=[str(layer_id) for layer_id in plan.moe_layer_ids],
            colorscale=scale,
            xgap=1,
            ygap=1,
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            text=marks if few else None,
            texttemplate="%{text}" if few else None,
            textfont={"color": MUTED},
        )
    )
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(dtick=max(1, len(plan.forms[0]) // 32))
    height = max(220, 120 + 34 * len(plan.forms)) if few else max(220, 120 + 14 * len(plan.forms))
    return _finish(figure, x_title="expert", y_title="layer", height=min(height, 1200))


def _steps(colours: list[str]) -> list[list[Any]]:
    """A colour scale of flat steps, one per colour."""
    count = len(colours)
    scale: list[list[Any]] = []
    for index, colour in enumerate(colours):
        scale += [[index / count, colour], [(index + 1) / count, colour]]
    return scale


def _finish(
    figure: Any,
    *,
    x_title: str | None = None,
    y_title: str | None = None,
    legend: bool = False,
    height: int = 420,
) -> Any:
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "color": INK, "size": 13},
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        height=height,
        showlegend=legend,
        legend={"orientation": "h", "y": -0.28},
    )
    figure.update_xaxes(title=x_title)
    figure.update_yaxes(title=y_title)
    return figure
