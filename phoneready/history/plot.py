"""history.html: every series over runs, with its own error bars and the changes that were found; opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from cfsp.errors import MissingExtraError
from phoneready.figures.figure_set import DENSE
from phoneready.history.history import Anomaly, History, Run, Series
from phoneready.report.escape import plot_text, script_json, spelled_out
from phoneready.report.plot_style import DENSE as DENSE_COLOUR
from phoneready.report.plot_style import PRUNED as PRUNED_COLOUR
from phoneready.report.plot_style import SERIES, plot_layout
from runtime_bench.records.summary import NORMAL_95

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}: history</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2733; background: #fbfaf6; }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 0; }
p, li { max-width: 46rem; } .worse { color: #9c2f1b; } .plot { height: 300px; }
</style>
</head>
<body>
<h1>{{ title }}: {{ runs }} runs</h1>
{% if anomalies %}
<ul>
{% for text, worse in anomalies %}<li{% if worse %} class="worse"{% endif %}>{{ text }}</li>
{% endfor %}</ul>
{% else %}
<p>No change that the noise does not explain.</p>
{% endif %}
{% for plot in plots %}
<section><h2>{{ plot.title }}</h2><div class="plot" id="{{ plot.id }}"></div></section>
{% endfor %}
<script>{{ plotly }}</script>
<script>
for (const [id, figure] of Object.entries({{ specs }}))
  Plotly.newPlot(id, figure.data, figure.layout, {responsive: true, displayModeBar: false});
</script>
</body>
</html>
"""


def render_plot(history: History, anomalies: Sequence[tuple[str, bool | None]]) -> str:
    """The page as HTML.

    Args:
        history: Runs, series, anomalies.
        anomalies: The anomalies for people, and whether each is for the worse.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError("plotly", "report") from error
    groups: dict[str, list[Series]] = {}
    for series in history.series:
        groups.setdefault(series.name, []).append(series)
    plots = [
        {"id": f"plot{number}", "title": name, "figure": _figure(members, history)}
        for number, (name, members) in enumerate(groups.items())
    ]
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_harmless,
    )
    return environment.from_string(_PAGE).render(
        title=history.source,
        runs=len(history.runs),
        anomalies=anomalies,
        plots=plots,
        plotly=Markup(get_plotlyjs()),
        specs=Markup(script_json({plot["id"]: plot["figure"] for plot in plots})),
    )


def _harmless(value: Any) -> Any:
    return spelled_out(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _figure(members: Sequence[Series], history: History) -> dict[str, Any]:
    """One figure: dense and pruned, and each way in which it was measured, a line."""
    own = [a for a in history.anomalies if a.series == members[0].name]
    layout = plot_layout(xaxis="run", yaxis=members[0].unit or members[0].metric)
    layout["shapes"] = [_mark(anomaly) for anomaly in own]
    layout["xaxis"] |= {
        "tickmode": "array",
        "tickvals": [run.number for run in history.runs],
        "ticktext": [plot_text(run.name) for run in history.runs],
    }
    lines = [_line(series, number, history.runs) for number, series in enumerate(members)]
    return {"data": lines, "layout": layout}


def _line(series: Series, number: int, runs: Sequence[Run]) -> dict[str, Any]:
    of_dense = series.role == DENSE
    colour = DENSE_COLOUR if of_dense else (PRUNED_COLOUR, *SERIES[1:])[number % len(SERIES)]
    line: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": series.role,
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
    at = anomaly.run - 0.5
    colour = "#9c2f1b" if anomaly.worse else "#4d7c4a"
    dash = "solid" if anomaly.kind == "step" else "dash"
    line = {"color": colour, "width": 2, "dash": dash}
    return {"type": "line", "x0": at, "x1": at, "yref": "paper", "y0": 0, "y1": 1, "line": line}
