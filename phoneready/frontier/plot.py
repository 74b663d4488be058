"""frontier.html: size, and decode speed, against bits per byte; opens offline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cfsp.units import format_bytes
from phoneready.evaluation.dominance import DOMINATED
from phoneready.frontier.record import Frontier, FrontierPoint
from phoneready.frontier.settings import BASE_QUANT
from phoneready.frontier.tables import conditions, frontier_table, megabytes, sentences
from phoneready.report.assets import plots_page
from phoneready.report.loss_plot import loss_figure


def render_frontier(found: Frontier) -> str:
    """The page as HTML.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    plots = {"plot-size": _figure(found, "file size, MB", lambda point: point.file_bytes / 1e6)}
    if any(point.times for point in found.points):
        axis = f"decode, times the dense {BASE_QUANT} file"
        plots["plot-speed"] = _figure(found, axis, lambda point: point.times)
    table = frontier_table(found)
    return plots_page(
        "frontier.html.j2",
        plots,
        source=found.source,
        lines=[line.strip().removeprefix("- ") for line in sentences(found)],
        conditions=conditions(found),
        titles=[column.title for column in table.columns],
        rows=[["-" if cell is None else cell for cell in row] for row in table.cells()],
        ids={"plot-size": "Size against loss", "plot-speed": "Decode speed against loss"},
        shown=list(plots),
    )


def _figure(found: Frontier, title: str, x: Callable[[FrontierPoint], float | None]) -> dict[str, Any]:
    models = list(dict.fromkeys(point.model for point in sorted(found.points, key=lambda p: not p.is_dense)))
    return loss_figure(
        {model: [point for point in found.points if point.model == model] for model in models},
        x,
        axis=title,
        beaten={one.file for one in found.standings if one.verdict == DOMINATED},
        name=lambda point: point.quant,
        lines=_lines,
    )


def _lines(point: FrontierPoint) -> list[str]:
    speed, peak = point.tokens_per_second, point.speed.peak_rss_bytes if point.speed else None
    return [
        megabytes(point.file_bytes),
        *([f"KL {point.kl_mean:.4f}"] if point.kl_mean is not None else []),
        *([f"{speed:.1f} tokens a second"] if speed else []),
        *([f"{format_bytes(peak)} of memory at most"] if peak else []),
        *(f"{t.task}: {t.metrics[0].value:.3f}" for t in point.tasks if t.metrics),
    ]
