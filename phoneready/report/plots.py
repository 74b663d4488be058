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
from types import MappingProxyType
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from cfsp.errors import MissingExtraError
from cfsp.pruning.plan import PruningPlan
from cfsp.units import format_bytes
from phoneready.evaluation.measured_file import DOMINATED
from phoneready.figures.figures import SHIPPED
from phoneready.release.results import ReleaseFigures
from runtime_bench.presentation.record_table import speed_text
from runtime_bench.presentation.table import Markdown, escape_cell, finalize_markdown
from runtime_bench.records import summary
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.compare import BenchGroup
from runtime_bench.records.fairness import has_speed

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
_BINS = 96
"""Most cells of a block in the picture of the pattern."""
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "star", "cross")


class Plot(NamedTuple):
    """A figure for plotly, and the id of its element."""

    id: str
    title: str
    caption: str
    figure: dict[str, Any]


class Axis(NamedTuple):
    """One side of a plot of files: title with unit, a file's place (None leaves it out), and its error bar."""

    title: str
    of: Callable[[Any], float | None]
    error: Callable[[Any], float | None] = lambda one: None


BITS = Axis("bits per byte", lambda one: float(one.bits_per_byte))


def make_plots(figures: ReleaseFigures, groups: Sequence[BenchGroup]) -> list[Plot]:
    """The plots that there are figures for; each group of benchmark records has its own."""
    speeds = (speed_plot(figures, group, number) for number, group in enumerate(groups))
    speeds_shown = [plot for plot in speeds if plot is not None]
    if not figures.losses:
        return speeds_shown
    sides = {"dense": "dense"} if figures.dense else {}
    sides |= {figures.word or "files": SHIPPED}
    figure = loss_figure(
        {side: [one for one in figures.losses if one.role == role] for side, role in sides.items()},
        Axis("file size, MiB", lambda one: float(one.file_bytes / 2**20)),
        BITS,
        beaten={file for file, one in figures.standings.items() if one.verdict == DOMINATED},
        name=lambda one: one.item,
        lines=lambda one: [format_bytes(one.file_bytes)],
    )
    sizes = [one.file_bytes / 2**20 for one in figures.losses]
    figure["layout"]["xaxis"]["range"] = [0.9 * min(sizes), 1.1 * max(sizes)]
    caption = (
        "Down and left is best. Open marks are files that another one dominates: it is no larger and loses no "
        "more on the same windows."
    )
    return [Plot("plot-losses", "Size against loss", caption, figure), *speeds_shown]


def loss_figure(
    series: Mapping[str, Sequence[Any]],
    x: Axis,
    y: Axis,
    *,
    beaten: Collection[str],
    name: Callable[[Any], str] | None,
    lines: Callable[[Any], Sequence[str]],
) -> dict[str, Any]:
    """Measured files in one series a model, the dense one first; without names they are joined by a line."""
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
            loss = f"{one.bits_per_byte:.4f} bits per byte, {over:+.2%}"
            told = [plot_text(one.label), *lines(one), loss, *(["dominated"] if one.file in beaten else [])]
            hover.append("<br>".join(told))
        trace = scatter(
            model,
            [place for place, _ in placed],
            hover,
            mode="markers+text" if name else "lines+markers",
            line={"color": colour},
            text=[plot_text(name(one)) for _, one in placed] if name else None,
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
    for index, ours in enumerate(figures.shipped):
        pair = [("dense", DENSE, one) for one in figures.dense if one.quant == ours.quant]
        for role, colour, export in (*pair, (figures.word, PRUNED, ours)):
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
            middle, low, high = span
            bars = {"type": "data", "symmetric": False, "thickness": 1.5, "width": 0}
            bars |= {"array": [high - middle], "arrayminus": [middle - low]}
            shown = {"color": colour, "size": 13, "symbol": SYMBOLS[index % len(SYMBOLS)]}
            point = (export.file_bytes / 2**20, middle)
            name = f"{export.quant} {role}".strip()
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
    return Plot(f"plot-speed-{number}", title, caption, figure)


def pattern_plot(plan: PruningPlan) -> Plot | None:
    """Block by channel: what is kept, and beside it each block's coarse score; None if no channel of a block goes."""
    if plan.keep_ratio == 1:
        return None
    number, bins = list(range(len(plan.blocks))), min(_BINS, *filter(None, plan.dense_widths))
    kept = []  # of each bin of a block's channels, in the order of the matrix
    for block, dense in zip(plan.blocks, plan.dense_widths, strict=True):
        counts, sizes = [0] * bins, [0] * bins
        for channel in range(dense):
            sizes[channel * bins // dense] += 1
        for channel in block.kept:
            counts[channel * bins // dense] += 1
        kept.append([count / size if size else None for count, size in zip(counts, sizes, strict=True)])
    pattern = {
        "type": "heatmap",
        **{"z": kept, "y": number, "x0": 50 / bins, "dx": 100 / bins, "zmin": 0, "zmax": 1, "ygap": 1},
        **{"colorscale": [[0, BAND], [1, PRUNED]], "showscale": False},
        "hovertemplate": "block %{y}, channels near %{x:.0f} %: %{z:.0%} kept<extra></extra>",
    }
    scores = {
        "type": "bar",
        **{"orientation": "h", "xaxis": "x2", "marker": {"color": SERIES[1]}, "hoverinfo": "text"},
        **{"y": number, "x": [block.importance for block in plan.blocks]},
        "hovertext": [
            f"block {index}: score {block.importance:.4f}, {block.width} of {dense} channels kept"
            for index, (block, dense) in enumerate(zip(plan.blocks, plan.dense_widths, strict=True))
        ],
    }
    layout = plot_layout(xaxis="FFN channel, % of the block's", yaxis="block")
    layout["xaxis2"] = plot_layout(xaxis="coarse score", yaxis="")["xaxis"]
    layout["xaxis2"] |= {"domain": [0.78, 1], "nticks": 4, "tickangle": 0}
    layout["xaxis"] |= {"domain": [0, 0.76], "showgrid": False}
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    caption = (
        f"Blue is kept; a cell is one of {bins} parts of a block's channels, in the order of its matrices. "
        "Bars are the coarse scores, by which blocks share what is kept."
    )
    figure = {"data": [pattern, scores], "layout": layout | {"showlegend": False}}
    return Plot("plot-pattern", "What is kept of each block", caption, figure)


def usable(record: BenchRecord) -> bool:
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


def speed_span(record: BenchRecord) -> tuple[float, float, float]:
    """The median of a record's samples, the slowest tenth and the fastest: tokens a second, else milliseconds."""
    values = record.samples_ts or tuple(ns / 1e6 for ns in record.samples_ns)
    middle, low, high = (summary.quantile(values, share) or 0.0 for share in (0.5, 0.1, 0.9))
    return middle, low, high


def plot_layout(*, xaxis: str, yaxis: str) -> dict[str, Any]:
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
    made = _environment(
        "phoneready.report", lambda it: spelled_out(it) if type(it) is str else it, autoescape=True
    )
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
