"""history.html: every series over runs, with its own error bars and the changes that were found; opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phoneready.figures.figure_set import DENSE
from phoneready.history.changes import STEP
from phoneready.history.history import Anomaly, History, Run, Series
from phoneready.report import plot_style
from phoneready.report.assets import plots_page
from phoneready.report.escape import plot_text
from runtime_bench.records.summary import NORMAL_95


def render_plot(history: History) -> str:
    """The page as HTML.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    groups: dict[str, list[Series]] = {}
    for series in history.series:
        groups.setdefault(series.name, []).append(series)
    ids = {name: f"plot{number}" for number, name in enumerate(groups)}
    plots = {ids[name]: _figure(members, history) for name, members in groups.items()}
    return plots_page("history.html.j2", plots, history=history, ids=ids)


def _figure(members: Sequence[Series], history: History) -> dict[str, Any]:
    """One figure: dense and pruned, and each way in which it was measured, a line."""
    layout = plot_style.plot_layout(xaxis="run", yaxis=plot_text(members[0].unit or members[0].metric))
    layout["shapes"] = [_mark(anomaly) for anomaly in history.anomalies if anomaly.series == members[0].name]
    layout["xaxis"] |= {
        "tickmode": "array",
        "tickvals": [run.number for run in history.runs],
        "ticktext": [plot_text(run.name) for run in history.runs],
    }
    lines = [_line(series, number, history.runs) for number, series in enumerate(members)]
    return {"data": lines, "layout": layout}


def _line(series: Series, number: int, runs: Sequence[Run]) -> dict[str, Any]:
    of_dense = series.role == DENSE
    colour = plot_style.DENSE if of_dense else plot_style.SERIES[number % len(plot_style.SERIES)]
    line: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plot_text(series.role),
        "x": list(series.runs),
        "y": list(series.values),
        "line": {"color": colour, "width": 1.5, "dash": "dot" if of_dense else "solid"},
        "text": [
            plot_text(", ".join((runs[r - 1].name, *(f"{k} {v}" for k, v in series.conditions.items()))))
            for r in series.runs
        ],
        "hovertemplate": "%{text}<br>%{y:.5g}<extra></extra>",
    }
    if series.sampled:
        halves = [NORMAL_95 * (e or 0.0) * v for e, v in zip(series.errors, series.values, strict=True)]
        line["error_y"] = {"type": "data", "array": halves, "thickness": 1, "width": 3, "color": colour}
    return line


def _mark(anomaly: Anomaly) -> dict[str, Any]:
    """An upright line just before the run that began it."""
    line = {
        "color": "#9c2f1b" if anomaly.worse else "#4d7c4a",
        "width": 2,
        "dash": "solid" if anomaly.kind == STEP else "dash",
    }
    x = anomaly.run - 0.5
    return {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": line}
