"""frontier.html: size, and decode speed, against bits per byte; opens offline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from phoneready.evaluation.dominance import DOMINATED
from phoneready.frontier.record import Frontier, FrontierPoint
from phoneready.frontier.tables import conditions, frontier_table, megabytes, sentences
from phoneready.report.assets import plots_page
from phoneready.report.escape import plot_text
from phoneready.report.plot_style import DENSE, SERIES, SYMBOLS, plot_layout, scatter


def render_frontier(found: Frontier) -> str:
    """The page as HTML.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    plots = {"plot-size": _figure(found, "file size, MB", lambda point: point.file_bytes / 1e6)}
    if any(_speed(point) for point in found.points):
        plots["plot-speed"] = _figure(found, "decode, tokens a second", _speed)
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
    """One series a model; dominated files are open, a line joins the others of each model."""
    beaten = {one.file for one in found.standings if one.verdict == DOMINATED}
    models = list(dict.fromkeys(point.model for point in sorted(found.points, key=lambda p: not p.is_dense)))
    data = [
        _series([p for p in found.points if p.model == model and x(p)], index, x, beaten)
        for index, model in enumerate(models)
    ]
    layout = plot_layout(xaxis=title, yaxis="bits per byte")
    return {"data": data, "layout": layout}


def _series(
    points: Sequence[FrontierPoint], index: int, x: Callable[[FrontierPoint], float | None], beaten: set[str]
) -> dict[str, Any]:
    ordered = sorted(points, key=lambda point: x(point) or 0.0)
    symbol = SYMBOLS[index % len(SYMBOLS)]
    colour = DENSE if not index else SERIES[(index - 1) % len(SERIES)]
    return scatter(
        ordered[0].model if ordered else "",
        [(x(point) or 0.0, point.bits_per_byte) for point in ordered],
        [_hover(point, point.file in beaten) for point in ordered],
        mode="markers+text",
        text=[plot_text(point.quant) for point in ordered],
        textposition="top center",
        textfont={"size": 10, "color": colour},
        marker={
            "size": 11,
            "color": colour,
            "symbol": [f"{symbol}-open" if point.file in beaten else symbol for point in ordered],
        },
    )


def _hover(point: FrontierPoint, beaten: bool) -> str:
    over = point.bits_per_byte / point.dense_bits_per_byte - 1
    lines = [
        plot_text(point.label),
        megabytes(point.file_bytes),
        f"{point.bits_per_byte:.4f} bits a byte, {over:+.2%}",
    ]
    lines += [f"{speed:.1f} tokens a second"] if (speed := _speed(point)) else []
    return "<br>".join([*lines, *(["dominated"] if beaten else [])])


def _speed(point: FrontierPoint) -> float | None:
    return point.speed.tokens_per_second if point.speed else None
