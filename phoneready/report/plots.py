"""Plots of the page, and what reports are made with: templates that escape, text made harmless, plotly.

Figures are plotly's plain JSON. Text that comes from models or files goes through `plot_text`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jinja2
from markupsafe import Markup

from cfsp.errors import MissingExtraError
from cfsp.units import format_bytes
from phoneready.evaluation.measured_file import DOMINATED
from phoneready.release.results import ReleaseFigures
from runtime_bench.presentation.markup import Markdown, escape_cell, finalize_markdown
from runtime_bench.presentation.record_table import speed_text
from runtime_bench.records import summary
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.compare import Comparison, compare_records
from runtime_bench.records.fairness import has_speed
from runtime_bench.records.groups import BenchGroup

INK, SOFT, GRID, BAND = "#1d2733", "#5b6673", "#e3e0d8", "#eceae3"
DENSE, PRUNED = "#8a8377", "#1f5f8b"
SERIES = ("#1f5f8b", "#b3592b", "#4d7c4a", "#7b5a93", "#a08024", "#3f8289")
DARK = MappingProxyType(
    {
        **{INK: "#e8e4da", SOFT: "#a7a79f", GRID: "#343b43", BAND: "#2a3037"},
        **{DENSE: "#a39c8e", PRUNED: "#74b3da"},
        **dict(zip(SERIES[1:], ("#e0935f", "#8fbf8a", "#b798d0", "#d2b45a", "#7cc0c6"), strict=True)),
    }
)
"""A colour of the light page -> its counterpart on the dark one."""
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "star", "cross")


@dataclass(frozen=True)
class Plot:
    """A figure for plotly, the id of its element, and where on the page it stands: `figures` or `losses`."""

    id: str
    title: str
    caption: str
    section: str
    height: int
    figure: dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """One side of a plot of files: title with unit, a file's place (None leaves it out), and its error bar."""

    title: str
    of: Callable[[Any], float | None]
    error: Callable[[Any], float | None] = lambda one: None


BITS = Axis("bits per byte", lambda one: float(one.bits_per_byte))


def make_plots(figures: ReleaseFigures, groups: Sequence[BenchGroup]) -> list[Plot]:
    """The plots that there are figures for; each group of benchmark records has its own."""
    plots = [losses_plot(figures)]
    for number, group in enumerate(groups):
        plots += [speed_plot(figures, group, number), ratio_plot(figures, group, number)]
    return [plot for plot in plots if plot is not None]


def losses_plot(figures: ReleaseFigures) -> Plot | None:
    """What every file of a release loses, against its size; None if that was not measured."""
    if not figures.losses:
        return None
    roles = ("dense", "pruned")
    figure = loss_figure(
        {role: [one for one in figures.losses if one.role == role] for role in roles},
        Axis("file size, MiB", lambda one: float(one.file_bytes / 2**20)),
        BITS,
        beaten={file for file, one in figures.standings.items() if one.verdict == DOMINATED},
        name=lambda one: one.item,
        lines=lambda one: [format_bytes(one.file_bytes)],
    )
    caption = (
        "Down and left is best. Open marks are files that another one dominates: it is no larger and surely loses no "
        "more on the same windows."
    )
    return Plot("plot-losses", "Size against loss", caption, "losses", 380, figure)


def loss_figure(
    series: Mapping[str, Sequence[Any]],
    x: Axis,
    y: Axis,
    *,
    beaten: Collection[str],
    name: Callable[[Any], str],
    lines: Callable[[Any], Sequence[str]],
) -> dict[str, Any]:
    """Measured files in one series a model, the dense one first."""
    data = []
    for index, (model, files) in enumerate(series.items()):
        places = ((x.of(one), y.of(one), one) for one in files)
        placed = sorted(
            [((right, up), one) for right, up, one in places if right is not None and up is not None],
            key=lambda pair: pair[0],
        )
        symbol = SYMBOLS[index % len(SYMBOLS)]
        colour = DENSE if not index else SERIES[(index - 1) % len(SERIES)]
        hover = []
        for _, one in placed:
            over = one.bits_per_byte / one.dense_bits_per_byte - 1
            loss = f"{one.bits_per_byte:.4f} bits a byte, {over:+.2%}"
            told = [plot_text(one.label), *lines(one), loss, *(["dominated"] if one.file in beaten else [])]
            hover.append("<br>".join(told))
        trace = scatter(
            model,
            [place for place, _ in placed],
            hover,
            mode="markers+text",
            text=[plot_text(name(one)) for _, one in placed],
            textposition="top center",
            textfont={"size": 10, "color": colour},
            marker={
                "size": 11,
                "color": colour,
                "symbol": [f"{symbol}-open" if one.file in beaten else symbol for _, one in placed],
            },
        )
        errors = [y.error(one) for _, one in placed]
        if any(errors):
            bars = {"type": "data", "array": [error or 0 for error in errors], "thickness": 1.5, "width": 0}
            trace["error_y"] = bars
        data.append(trace)
    return {"data": data, "layout": plot_layout(xaxis=plot_text(x.title), yaxis=plot_text(y.title))}


def speed_plot(figures: ReleaseFigures, group: BenchGroup, number: int) -> Plot | None:
    """Speed of generation over size, one point a file; None if no file generated."""
    tests = [key for key in group.main_tests() if key[0].startswith("tg")] or group.main_tests()
    if not tests:
        return None
    test, threads = tests[0]
    data, rate = [], True
    for index, pair in enumerate(figures.pairs):
        for role, colour, export in zip(("dense", "pruned"), (DENSE, PRUNED), pair, strict=True):
            record = group.find(export.file, test, threads)
            if not record or not has_speed(record):
                continue
            rate, span = bool(record.samples_ts), speed_span(record)
            lines = [
                plot_text(export.file),
                f"{format_bytes(export.file_bytes)}, {speed_text(record)}",
                f"perplexity {export.parity.ppl_export:.2f}",
                f"peak memory {format_bytes(group.peak_rss_bytes(export.file))}",
            ]
            point, shown = (export.file_bytes / 2**20, span[0]), marker(index, 13, colour)
            bars = error_bars([span])
            name = f"{export.quant} {role}"
            data.append(scatter(name, [point], ["<br>".join(lines)], error_y=bars, marker=shown))
    if not data:
        return None
    unit = "tokens a second" if rate else "milliseconds"
    layout = plot_layout(xaxis="file size, MiB", yaxis=f"{test}, {unit}")
    for axis in ("xaxis", "yaxis"):
        layout[axis] |= {"rangemode": "tozero"}
    caption = (
        f"{group.title}, {threads} thread{'s' if threads > 1 else ''}; "
        "bars reach from the slowest tenth of the samples to the fastest. Top left is best."
    )
    title = f"Speed against size: {group.kind}, {group.target}"
    figure = {"data": data, "layout": layout}
    return Plot(f"plot-speed-{number}", title, caption, "figures", 380, figure)


def ratio_plot(figures: ReleaseFigures, group: BenchGroup, number: int) -> Plot | None:
    """Speed of pruned over dense with intervals, one row a workload; None if nothing compares."""
    compared = []
    for index, (dense, pruned) in enumerate(figures.pairs):
        pairs = group.pairs(dense.file, pruned.file)
        found = [compare_records(a, b) for a, b in pairs if usable(a) and usable(b)]
        if rows := [c for c in found if isinstance(c, Comparison) and c.ratio and c.low and c.high]:
            compared.append((dense.quant, index, rows))
    if not compared:
        return None
    first = compared[0][2][0]
    threshold = first.threshold
    layout = plot_layout(xaxis="speed of pruned / dense", yaxis="")
    layout["yaxis"] |= {"type": "category", "autorange": "reversed", "automargin": True}
    layout["scattermode"] = "group"
    ends = [end for _, _, rows in compared for c in rows for end in (c.low or 1.0, c.high or 1.0)]
    # An interval of a few noisy samples may reach very far: it leaves the picture rather than shrink the others.
    low, high = max(min(*ends, 1 / (1 + threshold)), 0.4), min(max(*ends, 1 + threshold), 2.5)
    layout["xaxis"]["range"] = [low - 0.02, high + 0.02]
    one = {"type": "line", "x0": 1, "x1": 1, "line": {"color": SOFT, "width": 1}}
    band = {"type": "rect", "x0": 1 / (1 + threshold), "x1": 1 + threshold, "layer": "below"}
    band |= {"fillcolor": BAND, "line": {"width": 0}}
    layout["shapes"] = [shape | {"y0": 0, "y1": 1, "yref": "paper"} for shape in (band, one)]
    data = []
    for quant, index, rows in compared:
        spans = [(c.ratio or 0.0, c.low or 0.0, c.high or 0.0) for c in rows]
        tests = [f"{c.test}, {c.n_threads} thr." for c in rows]
        hover = [
            f"{plot_text(quant)}, {test}<br>{ratio:.3f} times as fast ({low:.3f} to {high:.3f})<br>{c.verdict}"
            for c, test, (ratio, low, high) in zip(rows, tests, spans, strict=True)
        ]
        points = [(ratio, test) for (ratio, _, _), test in zip(spans, tests, strict=True)]
        # Horizontal, so that quantizations of one workload stand above each other.
        shown = {"orientation": "h", "error_x": error_bars(spans), "marker": marker(index, 10)}
        data.append(scatter(quant, points, hover, **shown))
    caption = (
        f"{group.title}. Right of 1 is faster; lines are {first.confidence:.0%} intervals "
        f"of the ratio of medians. Inside the grey band, {threshold:.0%}, nothing is called a difference."
    )
    title = f"Speed, pruned over dense: {group.kind}, {group.target}"
    height = 130 + max(len(rows) for _, _, rows in compared) * (26 + 12 * len(compared))
    figure = {"data": data, "layout": layout}
    return Plot(f"plot-ratio-{number}", title, caption, "figures", height, figure)


def usable(record: BenchRecord) -> bool:
    """Whether a record's speed may be compared."""
    return record.ok and not record.void


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


# Explicit directions can make a name read as another one; plain marks (U+200E, U+200F, U+061C) cannot, and Arabic
# and Hebrew texts need them. Tabs and line breaks stay.
_CONTROLS = re.compile("[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]")
KINDS = {
    "measured": "Measured on the device that is named.",
    "constrained-host": "Measured on this machine under a device's limits of memory, cores and threads.",
    "emulated": "Run in an emulator: it shows that the file works there; its speed means nothing.",
    "projected": "Computed from a device's profile; nothing was run.",
}
"""What a reader must know of numbers of each kind."""


def render_page(
    template: str, context: Mapping[str, Any], plots: Mapping[str, Any], plotly: str, dark: Mapping[str, str]
) -> str:
    """A page that is complete in itself."""
    scripts = [Markup(text) for text in (plotly, _resource("report.js")) if plotly]
    # Our own scripts by their hash and nothing else, no network at all.
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    own = {
        "specs": Markup(script_json({"plots": plots, "dark": dict(dark)})),
        "scripts": scripts,
        "style": Markup(_resource("report.css")),
        "policy": (
            f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
            "base-uri 'none'; form-action 'none'"
        ),
    }
    # Controls of direction are spelled out before the text is escaped.
    made = _environment("phoneready.report", _spell, autoescape=True)
    return made.get_template(template).render(**context, **own)


def render_markdown(package: str, template: str, context: Mapping[str, Any]) -> str:
    """A template of Markdown in a package, with a final newline: each text in it is shown as it is."""
    made = _environment(package, finalize_markdown, autoescape=False)
    made.filters |= {
        "cell": lambda text: Markdown(escape_cell(text)),
        "table": lambda t: Markdown(t.markdown()),
    }
    return made.get_template(template).render(context) + "\n"


def plotly_script(*, needed: bool = False) -> str:
    """plotly.js as the Python package carries it; if that is not installed, empty, or MissingExtraError if needed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        if needed:
            raise MissingExtraError("plotly", "report") from None
        return ""
    return str(get_plotlyjs())


def spelled_out(text: str) -> str:
    """The text with control characters and overrides of direction spelled out, as `⟨U+202E⟩`."""
    return _CONTROLS.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def plot_text(text: str) -> str:
    """The text for plotly, which reads a few tags and entities in labels, and `%{...}` in templates of them."""
    return html.escape(spelled_out(text), quote=False).replace("%{", "%&#123;")


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no character of it can end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _spell(value: Any) -> Any:
    return spelled_out(value) if type(value) is str else value


def _environment(package: str, finalize: Callable[[Any], Any], *, autoescape: bool) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package, "templates"),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=finalize,
    )


def _resource(name: str) -> str:
    return importlib.resources.files("phoneready.report").joinpath("templates", name).read_text("utf-8")
