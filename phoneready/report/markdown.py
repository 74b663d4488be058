"""report.md: pruned against dense, what both answer, and how everything was measured."""

from __future__ import annotations

from exporters.export_record import ExportRecord
from phoneready.release.results import ReleaseFigures
from phoneready.report.assets import render_markdown
from phoneready.report.contents import ReportInput, contents
from phoneready.report.tables import COMPARED, bench_rows, comparison_table, quality_table
from runtime_bench.presentation.markup import Markdown, escape_markdown, visible
from runtime_bench.presentation.table import table_of_cells
from runtime_bench.records.groups import bench_groups

_HERE = ("measured", "local")


def render_report(report: ReportInput) -> str:
    """The report as Markdown."""
    figures = report.figures
    context = contents(report) | {
        "commands": [Markdown(visible(command)) for command in report.commands],
        "verdicts": [(d.quant, Markdown(verdict_table(figures, d, p))) for d, p in figures.pairs],
        "quality": Markdown(quality_text(figures)),
        "groups": bench_groups(figures.bench),
        "threads": ", ".join(str(n) for n in dict.fromkeys(r.n_threads for r in figures.bench)),
    }
    return render_markdown("phoneready.report", "report.md.j2", context)


def verdict_table(figures: ReleaseFigures, dense: ExportRecord, pruned: ExportRecord) -> str:
    """One quantization: size, perplexity, speed and memory of both files; a table for each place but this machine."""
    groups = bench_groups(figures.bench)
    here = next((group for group in groups if (group.kind, group.target) == _HERE), None)
    parts = [comparison_table(figures, here, dense, pruned).markdown()]
    for group in groups:
        rows = [] if group is here else bench_rows(group, dense.file, pruned.file)
        if rows:
            parts.append(f"{escape_markdown(group.title)}:\n\n{table_of_cells(COMPARED, rows).markdown()}")
    return "\n".join(parts)


def quality_text(figures: ReleaseFigures) -> str:
    """The pruned checkpoint against the dense one, before quantization."""
    return quality_table(figures.evaluation).markdown() or "Nothing was evaluated.\n"
