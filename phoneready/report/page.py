"""The page: one HTML file with its style, its script, its figures and plotly in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from phoneready.console import format_bytes
from phoneready.evaluation.tables import figure_tables
from phoneready.figures.verdict import INCONCLUSIVE, MISSED, PASS, BudgetVerdict
from phoneready.report.assets import KINDS, content_policy, environment, plotly_script, resource
from phoneready.report.devices import projection_tables
from phoneready.report.escape import script_json
from phoneready.report.inputs import ReportInput
from phoneready.report.markdown import bench_notes, headline
from phoneready.report.plot_style import DARK, Plot
from phoneready.report.plots import make_plots
from phoneready.report.tables import (
    SIDES,
    Mark,
    comparison_table,
    group_table,
    overview_table,
    proof_table,
    quality_table,
    record_table,
    text_name,
    verdict_rows,
    width_table,
)
from runtime_bench.presentation.comparison_table import speeds_text
from runtime_bench.records.compare import compare_records
from runtime_bench.records.groups import BenchGroup, bench_groups


@dataclass(frozen=True)
class Tile:
    """A figure at the top.

    Attributes:
        name: What it is.
        value: Of the pruned file.
        ratio: To the dense one's.
        verdict: What the samples allow to say of that ratio; empty for figures without noise.
    """

    name: str
    value: str
    ratio: str
    verdict: str = ""


def render_page(report: ReportInput) -> str:
    """The page as HTML, complete in itself.

    Without plotly (the extra `report`) the page has its tables and says what the plots need.
    """
    figures, plotly = report.figures, plotly_script()
    groups = bench_groups(figures.bench)
    plots = make_plots(figures, groups, report.sweep) if plotly else []
    specs = {"plots": {plot.id: plot.figure for plot in plots}, "dark": dict(DARK)}
    scripts = [Markup(text) for text in (plotly, resource("report.js")) if plotly and text]
    context = _context(report, groups) | {
        "plots": {plot.id: plot for plot in plots},
        "plot_groups": _by_section(plots),
        "specs": Markup(script_json(specs)),
        "scripts": scripts,
        "style": Markup(resource("report.css")),
        "policy": content_policy(scripts),
    }
    return environment().get_template("report.html.j2").render(context)


def _context(report: ReportInput, groups: Sequence[BenchGroup]) -> dict[str, Any]:
    """What the template shows, beside plots."""
    figures, first = report.figures, groups[0] if groups else None
    exports = (*figures.dense, *figures.pruned)
    verdicts = report.verdicts.verdicts if report.verdicts else ()
    return {
        "report": report,
        "figures": figures,
        "headline": headline(figures),
        "outcome": _outcome(verdicts),
        "baseline": report.verdicts.baseline if report.verdicts else None,
        "verdicts": verdict_rows(verdicts) if verdicts else None,
        "tiles": _tiles(report, first),
        "overview": overview_table(figures, first),
        "comparisons": [
            (pruned.quant, comparison_table(first, dense, pruned)) for dense, pruned in figures.pairs
        ],
        "first_group": first,
        "quality": quality_table(figures.evaluation),
        "evaluation": figure_tables(figures.evaluation, SIDES),
        "widths": width_table(figures.plan),
        "groups": [
            (group, KINDS[group.kind], group_table(figures, group), record_table(group)) for group in groups
        ],
        "projections": projection_tables(report.projections),
        "projected": KINDS["projected"],
        "answers": _answers(report),
        "proof": proof_table(exports),
        "warnings": [(r.file, warning) for r in exports for warning in r.warnings],
        "notes": bench_notes(figures.bench),
        "bytes": format_bytes,
        "text_name": text_name,
    }


def _outcome(verdicts: Sequence[BudgetVerdict]) -> Mark:
    """All verdicts in one."""
    if not verdicts:
        return Mark("no budgets set", "even")
    counts = {name: sum(v.outcome == name for v in verdicts) for name in (MISSED, INCONCLUSIVE, PASS)}
    total = len(verdicts)
    if counts[MISSED]:
        return Mark(f"{counts[MISSED]} of {total} budgets missed", "bad")
    if counts[INCONCLUSIVE]:
        return Mark(f"{counts[INCONCLUSIVE]} of {total} budgets inconclusive", "unsure")
    return Mark(f"all {total} budgets met" if total > 1 else "the budget is met", "good")


def _tiles(report: ReportInput, group: BenchGroup | None) -> list[Tile]:
    """The first quantization in a few figures."""
    dense, pruned = report.figures.pairs[0]
    size = f"{pruned.file_bytes / dense.file_bytes:.3f}"
    tiles = [Tile("file size", format_bytes(pruned.file_bytes), size)]
    if group:
        for test, threads in group.main_tests()[:1]:
            a, b = (group.find(record.file, test, threads) for record in (dense, pruned))
            if (
                a
                and b
                and a.ok
                and b.ok
                and not (a.void or b.void)
                and (found := compare_records(a, b)).ratio
            ):
                tiles.append(
                    Tile(f"speed, {test}", speeds_text(found)[1], f"{found.ratio:.2f}", found.verdict)
                )
        peaks = [group.peak_rss_bytes(record.file) for record in (dense, pruned)]
        if peaks[0] and peaks[1]:
            tiles.append(Tile("peak memory", format_bytes(peaks[1]), f"{peaks[1] / peaks[0]:.3f}"))
    for text in report.figures.evaluation.texts[:1]:
        if d := text.divergence:
            name = "perplexity, checkpoint"
            tiles.append(Tile(name, f"{d.perplexity:.2f}", f"{d.perplexity_ratio:.3f}"))
    return tiles


def _answers(report: ReportInput) -> list[dict[str, Any]]:
    """Question by question: (who, dense answer, pruned answer, why each is degenerate)."""
    figures, e = report.figures, report.figures.evaluation
    found = []
    for i, prompt in enumerate(figures.answers.prompts):
        sides = []
        if i < len(e.answers) and i < len(e.against_answers):
            why = e.degeneration
            flags = (
                why.against_reasons[i] if why and why.against_reasons else None,
                why.reasons[i] if why else None,
            )
            sides.append(("checkpoint, in torch", e.against_answers[i], e.answers[i], *flags))
        for dense, pruned in figures.pairs:
            said = figures.answers.answers
            sides.append((f"{dense.quant} file", said[dense.file][i], said[pruned.file][i], None, None))
        found.append({"prompt": prompt, "sides": sides})
    return found


def _by_section(plots: Sequence[Plot]) -> dict[str, list[Plot]]:
    sections: dict[str, list[Plot]] = {}
    for plot in plots:
        sections.setdefault(plot.section, []).append(plot)
    return sections
