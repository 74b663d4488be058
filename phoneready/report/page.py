"""The page: one HTML file with its style, its script, its figures and plotly in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cfsp.units import format_bytes
from phoneready.evaluation.tables import figure_tables
from phoneready.figures.verdict import INCONCLUSIVE, MISSED, BudgetVerdict
from phoneready.release.results import ReleaseFigures
from phoneready.report import assets
from phoneready.report.assets import KINDS, plotly_script
from phoneready.report.contents import ReportInput, contents
from phoneready.report.plots import make_plots, usable
from phoneready.report.tables import (
    NOTHING,
    SIDES,
    TONES,
    Mark,
    Row,
    comparison_table,
    group_table,
    overview_table,
    record_table,
    verdict_rows,
)
from runtime_bench.devices.projection import Band, Projection, project
from runtime_bench.presentation.comparison_table import speeds_text
from runtime_bench.presentation.table import Table, table_of_cells
from runtime_bench.records.compare import Comparison, compare_records
from runtime_bench.records.groups import BenchGroup, bench_groups

_FITS = {True: Mark("fits", "good"), False: Mark("does not fit", "bad"), None: Mark("unknown", "even")}


def render_page(report: ReportInput) -> str:
    """The page as HTML, complete in itself.

    Without plotly (the extra `report`) the page has its tables and says what the plots need.
    """
    figures, plotly = report.figures, plotly_script()
    groups = bench_groups(figures.bench)
    plots = make_plots(figures, groups, report.sweep) if plotly else []
    context = _context(report, groups) | {"plots": plots}
    return assets.render_page("report.html.j2", context, {plot.id: plot.figure for plot in plots}, plotly)


def _context(report: ReportInput, groups: Sequence[BenchGroup]) -> dict[str, Any]:
    """What the template shows, beside plots."""
    figures, first = report.figures, groups[0] if groups else None
    verdicts = report.verdicts.verdicts if report.verdicts else ()
    return contents(report) | {
        "outcome": _outcome(verdicts),
        "baseline": report.verdicts.baseline if report.verdicts else None,
        "verdicts": verdict_rows(verdicts) if verdicts else None,
        "tiles": _tiles(report.figures, first),
        "overview": overview_table(figures, first),
        "comparisons": [(p.quant, comparison_table(figures, first, d, p)) for d, p in figures.pairs],
        "first_group": first,
        "evaluation": figure_tables(figures.evaluation, SIDES),
        "groups": [
            (group, KINDS[group.kind], group_table(figures, group), record_table(group)) for group in groups
        ],
        "projections": _projection_tables(report),
        "meaning_of_projected": KINDS["projected"],
    }


def _outcome(verdicts: Sequence[BudgetVerdict]) -> Mark:
    """All verdicts in one."""
    if not verdicts:
        return Mark("no budgets set", "even")
    total = len(verdicts)
    for outcome in (MISSED, INCONCLUSIVE):
        if count := sum(verdict.outcome == outcome for verdict in verdicts):
            return Mark(f"{count} of {total} budgets {outcome}", TONES[outcome])
    return Mark(f"all {total} budgets met" if total > 1 else "the budget is met", "good")


def _tiles(figures: ReleaseFigures, group: BenchGroup | None) -> list[tuple[str, str, str, str]]:
    """The first quantization in a few figures: (name, value, ratio to the dense one's, what samples say of that)."""
    dense, pruned = figures.pairs[0]
    size = f"{pruned.file_bytes / dense.file_bytes:.3f}"
    tiles = [("file size", format_bytes(pruned.file_bytes), size, "")]
    if group:
        for test, threads in group.main_tests()[:1]:
            a, b = (group.find(record.file, test, threads) for record in (dense, pruned))
            comparison = compare_records(a, b) if a and b and usable(a) and usable(b) else None
            if isinstance(comparison, Comparison) and comparison.ratio:
                speed = speeds_text(comparison)[1]
                tiles.append((f"speed, {test}", speed, f"{comparison.ratio:.2f}", comparison.verdict))
        before, now = (group.peak_rss_bytes(record.file) for record in (dense, pruned))
        if before and now:
            tiles.append(("peak memory", format_bytes(now), f"{now / before:.3f}", ""))
    for text in figures.evaluation.texts[:1]:
        if d := text.divergence:
            ratio = f"{d.perplexity_ratio:.3f}"
            tiles.append(("perplexity, checkpoint", f"{d.perplexity:.2f}", ratio, ""))
    return tiles


def _projection_tables(report: ReportInput) -> list[tuple[str, int, Table[Row]]]:
    """One table a file, one row a device: (file, tokens of the context, table)."""
    header = ("device", "memory", "needs", "may have", "generation, t/s", "prompt, t/s")
    tables = []
    for file, facts in report.projected.items():
        context = min(report.config.bench.n_ctx, facts.context_length)
        rows = [_row(device.name, project(device, facts, context)) for device in report.devices]
        tables.append((file, context, table_of_cells(header, rows)))
    return tables


def _row(device: str, p: Projection) -> Row:
    limit = NOTHING if p.limit_bytes is None else format_bytes(p.limit_bytes)
    return (device, _FITS[p.fits], format_bytes(p.memory.total), limit, _band(p.decode), _band(p.prefill))


def _band(band: Band | None) -> str:
    return "unknown" if band is None else f"{_speed(band.low)} to {_speed(band.high)}"


def _speed(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
