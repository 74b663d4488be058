"""How the page's plots look: colours of the light page, their counterparts on the dark one, one layout for all.

Figures are plotly's plain JSON. Text that comes from models or files goes through `plot_text`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from phoneready.report.escape import plot_text
from runtime_bench.records import summary
from runtime_bench.records.bench_record import BenchRecord

INK, SOFT, GRID, BAND = "#1d2733", "#5b6673", "#e3e0d8", "#eceae3"
DENSE, PRUNED = "#8a8377", "#1f5f8b"
SERIES = ("#1f5f8b", "#b3592b", "#4d7c4a", "#7b5a93", "#a08024", "#3f8289")
STEPS = ("#f2efe7", "#c5d8e2", "#84adc7", "#44809f", "#123f5e")
"""From nothing to all, on the light page."""

DARK = MappingProxyType(
    {
        **{INK: "#e8e4da", SOFT: "#a7a79f", GRID: "#343b43", BAND: "#2a3037"},
        **{DENSE: "#a39c8e", PRUNED: "#74b3da"},
        **dict(zip(SERIES[1:], ("#e0935f", "#8fbf8a", "#b798d0", "#d2b45a", "#7cc0c6"), strict=True)),
        **dict(zip(STEPS, ("#20272e", "#284a60", "#3b7396", "#6aa8cb", "#d3e9f5"), strict=True)),
    }
)
"""A colour of the light page to its counterpart on the dark one."""

SYMBOLS = ("circle", "diamond", "square", "triangle-up", "star", "cross")


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
        id: Of its element.
        title: Above it.
        caption: Below it: what is seen.
        section: Where on the page it stands: `figures`, `losses`, `quality` or `pruning`.
        height: Pixels.
        figure: `data` and `layout` for plotly.
    """

    id: str
    title: str
    caption: str
    section: str
    height: int
    figure: dict[str, Any]


def scatter(
    name: str, points: Sequence[tuple[float, Any]], hover: Iterable[str], **more: Any
) -> dict[str, Any]:
    """plotly's trace of points (x, y), each with the text that is shown over it."""
    trace = {
        "type": "scatter",
        "mode": "markers",
        "name": plot_text(name),
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "hovertext": list(hover),
        "hoverinfo": "text",
    }
    return trace | more


def marker(index: int, size: int, colour: str | None = None) -> dict[str, Any]:
    """The markers of the series of that number, unless in a colour of their own."""
    chosen = colour or SERIES[index % len(SERIES)]
    return {"color": chosen, "size": size, "symbol": SYMBOLS[index % len(SYMBOLS)]}


def error_bars(spans: Iterable[tuple[float, float, float]]) -> dict[str, Any]:
    """Bars of values (middle, low, high)."""
    above, below = zip(*((high - middle, middle - low) for middle, low, high in spans), strict=True)
    shown = {"type": "data", "symmetric": False, "thickness": 1.5, "width": 0}
    return shown | {"array": list(above), "arrayminus": list(below)}


def speed_span(record: BenchRecord) -> tuple[float, float, float]:
    """The median of a record's samples, the slowest tenth and the fastest: tokens a second, else milliseconds."""
    values = record.samples_ts or tuple(ns / 1e6 for ns in record.samples_ns)
    middle, low, high = (summary.quantile(values, share) or 0.0 for share in (0.5, 0.1, 0.9))
    return middle, low, high


def plot_layout(*, xaxis: str, yaxis: str) -> dict[str, Any]:
    """A plain layout with the titles of both axes."""

    def axis(title: str) -> dict[str, Any]:
        return {
            "title": {"text": title, "font": {"size": 13, "color": SOFT}, "standoff": 8},
            "gridcolor": GRID,
            "linecolor": GRID,
            "tickfont": {"color": SOFT},
            "zeroline": False,
            "automargin": True,
            "fixedrange": True,
        }

    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "xaxis": axis(xaxis),
        "yaxis": axis(yaxis),
        "hovermode": "closest",
        "dragmode": False,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": INK}},
    }
