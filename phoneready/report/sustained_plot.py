"""Speed over minutes of generation, with the clocks and the heat beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phoneready.report.escape import plot_text
from phoneready.report.plot_style import marker, plot_layout, scatter
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.conditions import Conditions
from runtime_bench.records.sustained import curve

_BESIDE = {"hottest_c": ("hottest, °C", 1.0, "dot"), "clocks": ("clock, %", 100.0, "dash")}
"""Series of the conditions -> what it is called, its factor, and its line."""


def sustained_figure(records: Sequence[BenchRecord], names: Mapping[str, str]) -> dict[str, Any] | None:
    """plotly's figure: minutes to the right, speed upwards, heat and clocks by the axis on the right; None where no
    generation was sustained.

    Args:
        records: Of one kind, target and processor.
        names: Files -> what they are called.
    """
    lasting = [record for record in records if curve(record)]
    data = [
        trace
        for number, record in enumerate(lasting)
        for trace in _traces(record, names[record.model_filename], number)
    ]
    if not data:
        return None
    layout = plot_layout(xaxis="minutes", yaxis=f"{lasting[0].test}, tokens a second")
    layout["yaxis"] |= {"rangemode": "tozero"}
    axis: dict[str, Any] = plot_layout(xaxis="", yaxis="°C; clock, % of the highest")["yaxis"]
    layout["yaxis2"] = axis | {"overlaying": "y", "side": "right", "range": [0, 110], "showgrid": False}
    return {"data": data, "layout": layout}


def _traces(record: BenchRecord, name: str, number: int) -> list[dict[str, Any]]:
    colour = marker(number, 6)["color"]
    points = [(second / 60, speed) for second, speed in curve(record)]
    hover = [f"{plot_text(name)}<br>minute {x:.1f}<br>{y:.2f} t/s" for x, y in points]
    traces = [scatter(name, points, hover, mode="lines", line={"color": colour, "width": 2})]
    conditions = record.conditions[0] if record.conditions else None
    for series, (title, factor, dash) in _BESIDE.items():
        beside = _series(conditions, series, factor)
        shown = [f"{plot_text(name)}<br>minute {x:.1f}<br>{title} {y:.1f}" for x, y in beside]
        line = {"color": colour, "width": 1, "dash": dash}
        if beside:
            traces.append(scatter(f"{name}, {title}", beside, shown, mode="lines", line=line, yaxis="y2"))
    return traces


def _series(conditions: Conditions | None, name: str, factor: float) -> list[tuple[float, float]]:
    """(minutes since the first sample, value) wherever it was told while samples were timed."""
    if conditions is None:
        return []
    began = conditions.samples_s[0][0] if conditions.samples_s else 0.0
    return [((second - began) / 60, factor * value) for second, value in conditions.told(name)]
