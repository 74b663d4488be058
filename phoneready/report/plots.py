"""A page's plots, and those of what was measured: quality over ratio, speed over size, pruned over dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cfsp.units import format_bytes
from exporters.export_record import ExportRecord
from phoneready.evaluation.evaluation_record import Evaluation
from phoneready.evaluation.sweep import Sweep
from phoneready.release.results import ReleaseFigures
from phoneready.report.escape import plot_text
from phoneready.report.loss_plot import losses_plot
from phoneready.report.plot_style import (
    BAND,
    DENSE,
    PRUNED,
    SOFT,
    Plot,
    error_bars,
    marker,
    plot_layout,
    scatter,
    speed_span,
)
from phoneready.report.pruning_plots import allocation_plot, pattern_plot
from phoneready.report.tables import text_name
from runtime_bench.presentation.record_table import speed_text
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.compare import Comparison, compare_records
from runtime_bench.records.fairness import has_speed
from runtime_bench.records.groups import BenchGroup


def make_plots(figures: ReleaseFigures, groups: Sequence[BenchGroup], sweep: Sweep | None) -> list[Plot]:
    """The plots that there are figures for; each group of benchmark records has its own."""
    plots: list[Plot | None] = []
    for number, group in enumerate(groups):
        plots += [speed_plot(figures, group, number), ratio_plot(figures, group, number)]
    plots += [losses_plot(figures), quality_plot(figures, sweep)]
    plots += [] if figures.plan.keeps_blocks else [pattern_plot(figures.plan)]
    plots += [allocation_plot(figures.plan)] if figures.plan.keep_ratio < 1 else []
    return [plot for plot in plots if plot is not None]


def quality_plot(figures: ReleaseFigures, sweep: Sweep | None) -> Plot | None:
    """Perplexity over the share of channels removed: the sweep where there is one, checkpoints, and files.

    None where no channel went, or where the tokens are others than the dense model's, as their perplexities say
    nothing together.
    """
    if figures.plan.vocabulary or figures.plan.keep_ratio == 1:
        return None
    removed = 1 - figures.plan.keep_ratio
    data: list[dict[str, Any]] = []
    if sweep:
        points = [(0.0, {}), *((p.removed, _ratios(p.evaluation)) for p in sweep.points)]
        for name in points[-1][1]:
            series = [(x, ratios.get(name, 1.0)) for x, ratios in points]
            data.append(_line(f"sweep, {name}", series, len(data), dash="dot"))
    for name, ratio in _ratios(figures.evaluation).items():
        data.append(_line(f"checkpoint, {name}", [(0.0, 1.0), (removed, ratio)], len(data)))
    for dense, pruned in figures.pairs:
        base = dense.parity.ppl_checkpoint
        series = [(0.0, dense.parity.ppl_export / base), (removed, pruned.parity.ppl_export / base)]
        data.append(_line(f"{dense.quant}, file", series, len(data), dash="dash"))
    layout = plot_layout(xaxis="share of FFN channels removed", yaxis="perplexity / dense checkpoint's")
    layout["xaxis"] |= {"tickformat": ".0%", "rangemode": "tozero"}
    caption = (
        "1 is the dense checkpoint; lower is better. Files are measured on the text that proves them, checkpoints on "
        "the evaluation's: follow a line, do not compare points of different texts."
    )
    figure = {"data": data, "layout": layout}
    return Plot("plot-quality", "Quality against ratio", caption, "quality", 380, figure)


def speed_plot(figures: ReleaseFigures, group: BenchGroup, number: int) -> Plot | None:
    """Speed of generation over size, one point a file; None where no file generated."""
    tests = [key for key in group.main_tests() if key[0].startswith("tg")] or group.main_tests()
    if not tests:
        return None
    test, threads = tests[0]
    data, rate = [], True
    for index, pair in enumerate(figures.pairs):
        for role, colour, export in zip(("dense", "pruned"), (DENSE, PRUNED), pair, strict=True):
            record = group.find(export.file, test, threads)
            if record and has_speed(record):
                rate = bool(record.samples_ts)
                peak, shown = group.peak_rss_bytes(export.file), marker(index, 13, colour)
                data.append(_point(f"{export.quant} {role}", export, record, peak) | {"marker": shown})
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
    """Speed of pruned over dense with intervals, one row a workload; None where nothing compares."""
    compared = [
        (dense.quant, index, rows)
        for index, (dense, pruned) in enumerate(figures.pairs)
        if (rows := _comparisons(group.pairs(dense.file, pruned.file)))
    ]
    if not compared:
        return None
    threshold = compared[0][2][0].threshold
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
    caption = (
        f"{group.title}. Right of 1 is faster; lines are {compared[0][2][0].confidence:.0%} intervals "
        f"of the ratio of medians. Inside the grey band, {threshold:.0%}, nothing is called a difference."
    )
    title = f"Speed, pruned over dense: {group.kind}, {group.target}"
    height = 130 + max(len(rows) for _, _, rows in compared) * (26 + 12 * len(compared))
    figure = {"data": [_intervals(*series) for series in compared], "layout": layout}
    return Plot(f"plot-ratio-{number}", title, caption, "figures", height, figure)


def _comparisons(pairs: Sequence[tuple[BenchRecord, BenchRecord]]) -> list[Comparison]:
    comparisons = [
        compare_records(dense, pruned) for dense, pruned in pairs if usable(dense) and usable(pruned)
    ]
    return [c for c in comparisons if isinstance(c, Comparison) and c.ratio and c.low and c.high]


def usable(record: BenchRecord) -> bool:
    """Whether a record's speed may be compared."""
    return record.ok and not record.void


def _intervals(quant: str, index: int, rows: Sequence[Comparison]) -> dict[str, Any]:
    spans = [(c.ratio or 0.0, c.low or 0.0, c.high or 0.0) for c in rows]
    tests = [f"{c.test}, {c.n_threads} thr." for c in rows]
    hover = [
        f"{plot_text(quant)}, {test}<br>{ratio:.3f} times as fast ({low:.3f} to {high:.3f})<br>{c.verdict}"
        for c, test, (ratio, low, high) in zip(rows, tests, spans, strict=True)
    ]
    return scatter(
        quant,
        [(ratio, test) for (ratio, _, _), test in zip(spans, tests, strict=True)],
        hover,
        orientation="h",  # so that quantizations of one workload stand above each other
        error_x=error_bars(spans),
        marker=marker(index, 10),
    )


def _ratios(evaluation: Evaluation) -> dict[str, float]:
    return {
        f"{text.kind} {text_name(text.source, evaluation.seed)}": text.divergence.perplexity_ratio
        for text in evaluation.texts
        if text.divergence
    }


def _line(
    name: str, points: Sequence[tuple[float, float]], index: int, dash: str = "solid"
) -> dict[str, Any]:
    shown = marker(index, 9)
    return scatter(
        name,
        points,
        [f"{plot_text(name)}<br>{x:.1%} removed<br>{y:.3f} times the perplexity" for x, y in points],
        mode="lines+markers",
        line={"color": shown["color"], "dash": dash, "width": 2},
        marker=shown,
    )


def _point(name: str, export: ExportRecord, record: BenchRecord, peak: int | None) -> dict[str, Any]:
    span = speed_span(record)
    lines = [
        plot_text(export.file),
        f"{format_bytes(export.file_bytes)}, {speed_text(record)}",
        f"perplexity {export.parity.ppl_export:.2f}",
        f"peak memory {format_bytes(peak)}",
    ]
    point = (export.file_bytes / 2**20, span[0])
    return scatter(name, [point], ["<br>".join(lines)], error_y=error_bars([span]))
