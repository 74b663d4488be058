"""report.html and report.md: one set of tables, made from records only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.records import read_record
from cfsp.units import format_bytes
from exporters.export_record import ExportRecord
from phoneready.evaluation.measured_file import DOMINATED
from phoneready.evaluation.tables import WHAT_STANDINGS_MEAN, figure_tables, measured_on, vocabulary_note
from phoneready.figures.figures import INCONCLUSIVE, MISSED, VERDICTS_FILE, BudgetVerdict, Verdicts
from phoneready.release.results import ReleaseFigures
from phoneready.report import plots, tables
from phoneready.report.plots import usable
from phoneready.report.tables import COMPARED, NOTHING, SIDES, TONES, Mark, Row
from phoneready.settings.schema import ReleaseConfig
from runtime_bench.devices.model_facts import ModelFacts
from runtime_bench.devices.profile import DeviceProfile
from runtime_bench.devices.projection import Band, project
from runtime_bench.presentation.comparison_table import speeds_text
from runtime_bench.presentation.markup import Markdown, escape_markdown, visible
from runtime_bench.presentation.table import Table, table_of_cells
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.compare import Comparison, compare_records
from runtime_bench.records.groups import BenchGroup, bench_groups
from runtime_bench.records.notes import note_of

_MODELS = ("dense model", "pruned one")


@dataclass(frozen=True)
class ReportInput:
    """Everything that the reports show: `projected` has what a pruned file's projection onto `devices` needs, by its
    name."""

    config: ReleaseConfig
    figures: ReleaseFigures
    versions: Mapping[str, str]
    commands: tuple[str, ...]
    seconds: Mapping[str, float]
    projected: Mapping[str, ModelFacts]
    devices: tuple[DeviceProfile, ...]
    verdicts: Verdicts | None = None


def read_verdicts(folder: Path) -> Verdicts | None:
    """The verdicts that a release's gate left in its folder, if any; raises InputError for a file of another kind."""
    file = folder / VERDICTS_FILE
    return read_record(Verdicts, file) if file.is_file() else None


def render_page(report: ReportInput) -> str:
    """The page as HTML, complete in itself; without plotly (the extra `report`) it says what the plots need."""
    figures, plotly = report.figures, plots.plotly_script()
    groups = bench_groups(figures.bench)
    first = groups[0] if groups else None
    verdicts = report.verdicts.verdicts if report.verdicts else ()
    made = plots.make_plots(figures, groups) if plotly else []
    context = _contents(report) | {
        "plots": made,
        "outcome": _outcome(verdicts),
        "baseline": report.verdicts.baseline if report.verdicts else None,
        "verdicts": tables.verdict_rows(verdicts) if verdicts else None,
        "tiles": _tiles(figures, first),
        "overview": tables.overview_table(figures, first),
        "comparisons": [(p.quant, tables.comparison_table(figures, first, d, p)) for d, p in figures.pairs],
        "first_group": first,
        "evaluation": figure_tables(figures.evaluation, SIDES),
        "groups": [
            (one, plots.KINDS[one.kind], tables.group_table(figures, one), tables.record_table(one))
            for one in groups
        ],
        "projections": _projections(report),
        "meaning_of_projected": plots.KINDS["projected"],
    }
    shown = {plot.id: plot.figure for plot in made}
    return plots.render_page("report.html.j2", context, shown, plotly, plots.DARK)


def render_report(report: ReportInput) -> str:
    """The report as Markdown."""
    figures = report.figures
    context = _contents(report) | {
        "commands": [Markdown(visible(command)) for command in report.commands],
        "verdicts": [(d.quant, Markdown(verdict_table(figures, d, p))) for d, p in figures.pairs],
        "quality": Markdown(quality_text(figures)),
        "groups": bench_groups(figures.bench),
        "threads": ", ".join(str(n) for n in dict.fromkeys(r.n_threads for r in figures.bench)),
    }
    return plots.render_markdown("phoneready.report", "report.md.j2", context)


def _contents(report: ReportInput) -> dict[str, Any]:
    """What both reports show."""
    figures = report.figures
    exports = (*figures.dense, *figures.pruned)
    return {
        "report": report,
        "figures": figures,
        "headline": headline(figures),
        "beaten": beaten(figures),
        "losses": tables.losses_table(figures),
        "measured_on": measured_on(figures.losses) if figures.losses else "",
        "standings": WHAT_STANDINGS_MEAN,
        "quality": tables.quality_table(figures.evaluation),
        "quality_note": vocabulary_note(figures.evaluation, _MODELS),
        "widths": tables.width_table(figures.plan),
        "vocabulary": tables.vocabulary_table(figures.plan),
        "answers": _answers(figures),
        "proof": tables.proof_table(exports),
        "warnings": [(r.file, warning) for r in exports for warning in r.warnings],
        "notes": bench_notes(figures.bench),
        "bytes": format_bytes,
        "text_name": tables.text_name,
    }


def headline(figures: ReleaseFigures) -> str:
    """The outcome in one sentence."""
    dense, pruned = figures.pairs[0]
    size = pruned.file_bytes / dense.file_bytes
    parts = [
        figures.plan.removed,
        f"the {pruned.quant} file is {format_bytes(pruned.file_bytes)}, {size:.3f} times the dense one",
    ]
    for text in figures.evaluation.texts:
        if d := text.divergence:
            parts.append(
                f"on {text.kind} perplexity is {d.perplexity_ratio:.3f} times the dense model's "
                f"and the first choice is the same for {d.same_top1:.1%} of the tokens"
            )
        elif text.bits_per_byte and text.against_bits_per_byte:
            ratio = text.bits_per_byte / text.against_bits_per_byte
            parts.append(f"on {text.kind} bits per byte are {ratio:.4f} times the dense model's")
    return "; ".join(parts) + "."


def beaten(figures: ReleaseFigures) -> list[str]:
    """For every pruned file that another one of the release dominates, a sentence."""
    sentences = []
    for pruned in (one for one in figures.losses if not one.is_dense):
        where = figures.standings[pruned.file]
        best = figures.losses_of(where.by)
        if where.verdict == DOMINATED and best is not None:
            sizes = f"{format_bytes(best.file_bytes)} against {format_bytes(pruned.file_bytes)}"
            losses = f"{best.bits_per_byte:.4f} bits a byte against {pruned.bits_per_byte:.4f}"
            sentences.append(f"The {best.label} file dominates the {pruned.label} file: {sizes}, {losses}.")
    return sentences


def bench_notes(records: Sequence[BenchRecord]) -> list[str]:
    """What a reader must know about the samples, each remark once with its rows."""
    rows: dict[str, list[str]] = {}
    for record in records:
        if remark := record.failure or note_of(record):
            rows.setdefault(remark, []).append(f"{record.model_filename} {record.test}")
    return [f"{remark}: {', '.join(names)}" for remark, names in rows.items()]


def verdict_table(figures: ReleaseFigures, dense: ExportRecord, pruned: ExportRecord) -> str:
    """One quantization: size, perplexity, speed and memory of both files; a table for each place but this machine."""
    groups = bench_groups(figures.bench)
    here = next((group for group in groups if (group.kind, group.target) == ("measured", "local")), None)
    parts = [tables.comparison_table(figures, here, dense, pruned).markdown()]
    for group in groups:
        rows = [] if group is here else tables.bench_rows(group, dense.file, pruned.file)
        if rows:
            parts.append(f"{escape_markdown(group.title)}:\n\n{table_of_cells(COMPARED, rows).markdown()}")
    return "\n".join(parts)


def quality_text(figures: ReleaseFigures) -> str:
    """The pruned checkpoint against the dense one, before quantization."""
    return tables.quality_table(figures.evaluation).markdown() or "Nothing was evaluated.\n"


def _answers(figures: ReleaseFigures) -> list[tuple[str, list[tuple[str | None, ...]]]]:
    """Question by question: (who, dense answer, pruned answer, why each is degenerate)."""
    said = figures.answers.answers
    questions = []
    for i, prompt in enumerate(figures.answers.prompts):
        sides: list[tuple[str | None, ...]] = []
        of = figures.evaluation
        if i < len(of.answers) and i < len(of.against_answers):
            why = of.degeneration
            reasons = (why.against_reasons[i], why.reasons[i]) if why else (None, None)
            sides.append(("checkpoint, in torch", of.against_answers[i], of.answers[i], *reasons))
        for dense, pruned in figures.pairs:
            sides.append((f"{dense.quant} file", said[dense.file][i], said[pruned.file][i], None, None))
        questions.append((prompt, sides))
    return questions


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


def _projections(report: ReportInput) -> list[tuple[str, int, Table[Row]]]:
    """One table a file, one row a device: (file, tokens of the context, table)."""

    def band(found: Band | None) -> str:
        if found is None:
            return "unknown"
        low, high = (f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in (found.low, found.high))
        return f"{low} to {high}"

    header = ("device", "memory", "needs", "may have", "generation, t/s", "prompt, t/s")
    fits = {True: Mark("fits", "good"), False: Mark("does not fit", "bad"), None: Mark("unknown", "even")}
    found = []
    for file, facts in report.projected.items():
        context = min(report.config.bench.n_ctx, facts.context_length)
        rows: list[Row] = []
        for device in report.devices:
            p = project(device, facts, context)
            limit = NOTHING if p.limit_bytes is None else format_bytes(p.limit_bytes)
            speeds = (band(p.decode), band(p.prefill))
            rows.append((device.name, fits[p.fits], format_bytes(p.memory.total), limit, *speeds))
        found.append((file, context, table_of_cells(header, rows)))
    return found
