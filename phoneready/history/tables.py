"""A history for people: Markdown."""

from __future__ import annotations

from phoneready.figures.figure_set import DENSE
from phoneready.figures.verdict import format_figure
from phoneready.history.history import History, Series
from runtime_bench.presentation.markup import escape_markdown
from runtime_bench.presentation.table import table_of_cells

_SHOWN = 6
"""Newest runs in the table of figures."""


def format_history(history: History, *, every: bool = False) -> str:
    """Runs, figures of the newest of them, and what changed.

    Args:
        history: The history.
        every: Show the dense model's figures, too.
    """
    runs = [
        [str(run.number), run.name, run.time, run.outcome, "; ".join(run.changed) or "-"]
        for run in history.runs
    ]
    told = [f"- {escape_markdown(anomaly.describe())}" for anomaly in history.anomalies]
    parts = [
        f"{escape_markdown(history.source)}: {len(runs)} runs",
        table_of_cells(
            ["run", "name", "time (UTC)", "budgets", "changed since the run before"], runs
        ).markdown(),
        _figures(history, every=every),
        "Changes that the noise does not explain:" if told else "No change that the noise does not explain.",
        "\n".join(told),
        f"(more than {history.threshold:.0%}; in a history without changes "
        f"the chance to see any is at most {history.false_alarms:.0%})",
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _figures(history: History, *, every: bool) -> str:
    shown = history.runs[-_SHOWN:]
    header = ["figure", *(run.name for run in shown), "changed"]
    rows = []
    for series in history.series:
        if series.role == DENSE and not every:
            continue
        known = dict(zip(series.runs, zip(series.values, series.errors, strict=True), strict=True))
        cells = [_cell(known.get(run.number), series) for run in shown]
        since = [a.name for a in history.anomalies if (a.series, a.role) == (series.name, series.role)]
        name = f"{series.name} (dense)" if series.role == DENSE else series.name
        rows.append([name, *cells, ", ".join(since) or "-"])
    return table_of_cells(header, rows).markdown()


def _cell(found: tuple[float, float | None] | None, series: Series) -> str:
    if found is None:
        return "-"
    value, error = found
    return format_figure(value, series.unit) + (f" ± {100 * error:.1f} %" if error else "")
