"""Size against speed against quality, one point a model: a page of its own that opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cfsp.units import format_bytes
from phoneready.report.assets import KINDS, plots_page
from phoneready.report.escape import plot_text
from phoneready.report.model_points import ModelPoint, PointGroup, Quality
from phoneready.report.plot_style import (
    SOFT,
    STEPS,
    SYMBOLS,
    error_bars,
    plot_layout,
    scatter,
    speed_span,
)
from phoneready.report.sustained_plot import sustained_figure
from runtime_bench.presentation.record_table import speed_text
from runtime_bench.presentation.table import short_names


def render_comparison(groups: Sequence[PointGroup], quality: Quality | None) -> str:
    """The page as HTML, complete in itself.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    names = short_names(record.model_filename for group in groups for record in group.records)
    lasting = [sustained_figure(group.records, names) for group in groups]
    figures = {f"plot-{i}": models_figure(group, quality, names) for i, group in enumerate(groups)}
    figures |= {f"sustained-{i}": figure for i, figure in enumerate(lasting) if figure is not None}
    return plots_page(
        "comparison.html.j2",
        figures,
        groups=[
            (f"plot-{i}", group, KINDS[group.kind], _rows(group, names), lasting[i] and f"sustained-{i}")
            for i, group in enumerate(groups)
        ],
        quality=quality.name if quality else None,
        names=names,
    )


def models_figure(group: PointGroup, quality: Quality | None, names: dict[str, str]) -> dict[str, Any]:
    """plotly's figure: size to the right, speed upwards, quality as colour, engines as symbols."""
    engines = list(dict.fromkeys(point.record.engine for point in group.points))
    data = []
    for index, engine in enumerate(engines):
        for known in (True, False):
            points = [
                p for p in group.points if p.record.engine == engine and (p.quality is not None) is known
            ]
            if points:
                data.append(_trace(points, engine, SYMBOLS[index % len(SYMBOLS)], known, names))
    rate = all(point.record.samples_ts for point in group.points)
    unit = "tokens a second" if rate else "milliseconds"
    layout = plot_layout(xaxis="file size, MiB", yaxis=f"{group.test}, {unit}")
    for axis in ("xaxis", "yaxis"):
        layout[axis] |= {"rangemode": "tozero"}
    layout["coloraxis"] = {
        "colorscale": [[i / (len(STEPS) - 2), colour] for i, colour in enumerate(STEPS[1:])],
        "colorbar": {"title": {"text": "quality: low is good", "side": "right"}, "thickness": 12, "len": 0.9},
    }
    layout["showlegend"] = len(engines) > 1
    return {"data": data, "layout": layout}


def _trace(
    points: Sequence[ModelPoint], engine: str, symbol: str, known: bool, names: dict[str, str]
) -> dict[str, Any]:
    """Points of one engine; those without a known quality are open."""
    spans = [speed_span(point.record) for point in points]
    marker: dict[str, Any] = {"size": 15, "symbol": symbol if known else f"{symbol}-open", "color": SOFT}
    if known:
        marker |= {"color": [point.quality for point in points], "coloraxis": "coloraxis"}
        marker["line"] = {"width": 1, "color": SOFT}
    sizes = [(point.record.file_size_bytes or 0) / 2**20 for point in points]
    return scatter(
        engine + ("" if known else ", quality unknown"),
        [(size, middle) for size, (middle, _, _) in zip(sizes, spans, strict=True)],
        [_hover(point, names) for point in points],
        mode="markers+text",
        error_y=error_bars(spans) | {"color": SOFT},
        text=[plot_text(names[point.record.model_filename]) for point in points],
        textposition="top center",
        textfont={"size": 11, "color": SOFT},
        marker=marker,
    )


def _hover(point: ModelPoint, names: dict[str, str]) -> str:
    record = point.record
    lines = [
        plot_text(names[record.model_filename]),
        f"{format_bytes(record.file_size_bytes)}, {speed_text(record)}, {record.n_threads} thr.",
        f"peak memory {format_bytes(record.peak_rss_bytes)}",
        f"quality {_quality(point)}",
    ]
    return "<br>".join(lines)


def _quality(point: ModelPoint) -> str:
    return "unknown" if point.quality is None else f"{point.quality:.4g}"


def _rows(group: PointGroup, names: dict[str, str]) -> list[list[str]]:
    return [
        [
            names[point.record.model_filename],
            point.record.engine,
            str(point.record.n_threads),
            format_bytes(point.record.file_size_bytes),
            speed_text(point.record),
            format_bytes(point.record.peak_rss_bytes),
            _quality(point),
        ]
        for point in group.points
    ]
