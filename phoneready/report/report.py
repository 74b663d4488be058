"""report.html and report.md: one verdict and one set of tables, made from records only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from cfsp.pruning.plan import PruningPlan
from cfsp.units import format_bytes, megabytes
from exporters.export_record import ExportRecord
from phoneready.evaluation.evaluation_record import TextLoss
from phoneready.evaluation.measured_file import DOMINATED, choose_and_test
from phoneready.evaluation.tables import (
    WHAT_STANDINGS_MEAN,
    figure_tables,
    loss_columns,
    measured_on,
    standing_column,
    text_table,
    vocabulary_note,
)
from phoneready.figures.figures import (
    INCONCLUSIVE,
    METRICS,
    MISSED,
    OUTCOMES,
    BudgetVerdict,
    Verdicts,
)
from phoneready.figures.gate import NO_BUDGETS
from phoneready.release.results import ReleaseFigures
from phoneready.release.steps import FileLosses
from phoneready.report import plots
from phoneready.settings.schema import ReleaseConfig
from runtime_bench.devices import Band, DeviceProfile, ModelFacts, project
from runtime_bench.presentation.comparison_table import NOT_COMPARABLE, speeds_text
from runtime_bench.presentation.record_table import energy_text, speed_text
from runtime_bench.presentation.table import Column, Markdown, Table, escape_markdown, table_of_cells, visible
from runtime_bench.records.compare import (
    BETTER,
    NO_DIFFERENCE,
    WORSE,
    BenchGroup,
    Comparison,
    Incomparable,
    bench_groups,
    compare_records,
)
from runtime_bench.records.fairness import DISTURBED, THROTTLED, energy, fairness, note_of, unfair
from runtime_bench.records.summary import CONFIDENCE

NOTHING = "-"
TONES = {
    **dict(zip(OUTCOMES, ("bad", "unsure", "good"), strict=True)),
    **{"faster": "good", "slower": "bad", "no difference": "even", "too noisy to tell": "unsure"},
    **{THROTTLED: "bad", DISTURBED: "unsure"},
}
"""Outcome or verdict to the tone that it is shown in."""


class Mark(NamedTuple):
    """A cell with a word that is set apart, in a tone: `good`, `bad`, `even` or `unsure`; `text` stands before it."""

    word: str
    tone: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.text}: {self.word}" if self.text else self.word


Cell: TypeAlias = str | Mark
Row: TypeAlias = Sequence[Cell]


class ReportInput(NamedTuple):
    """Everything that the reports show; `projected` has the facts of files that ship for `devices`, by their names."""

    config: ReleaseConfig
    figures: ReleaseFigures
    versions: Mapping[str, str]
    commands: tuple[str, ...]
    seconds: Mapping[str, float]
    projected: Mapping[str, ModelFacts]
    devices: tuple[DeviceProfile, ...]
    verdicts: Verdicts | None = None


def render_page(report: ReportInput) -> str:
    """The page as HTML, complete in itself; without plotly (the extra `report`) it says what the plots need."""
    figures, plotly = report.figures, plots.plotly_script()
    groups = bench_groups(figures.bench)
    first = groups[0] if groups else None
    verdicts = report.verdicts.verdicts if report.verdicts else ()
    made = plots.make_plots(figures, groups) if plotly else []
    pattern = plots.pattern_plot(figures.plan) if plotly and figures.plan else None
    outcome = Mark(NO_BUDGETS, "even")
    if verdicts:
        outcome = Mark(f"all {len(verdicts)} budgets met" if verdicts[1:] else "the budget is met", "good")
    for bad in (INCONCLUSIVE, MISSED):
        if count := sum(verdict.outcome == bad for verdict in verdicts):
            outcome = Mark(f"{count} of {len(verdicts)} budgets {bad}", TONES[bad])
    context = _contents(report) | {
        "plots": made,
        "pattern": pattern,
        "outcome": outcome,
        "baseline": report.verdicts.baseline if report.verdicts else None,
        "verdicts": verdict_rows(verdicts) if verdicts else None,
        "comparisons": [(pair[0].quant, comparison_table(figures, first, *pair)) for pair in figures.pairs],
        "first_group": first,
        "evaluation": figure_tables(figures.evaluation, _sides(figures)),
        "groups": [(g, plots.KINDS[g.kind], group_table(figures, g), record_table(g)) for g in groups],
        "projections": _projections(report),
        "meaning_of_projected": plots.KINDS["projected"],
    }
    shown = {plot.id: plot.figure for plot in (*made, pattern) if plot}
    return plots.render_page("report.html.j2", context, shown, plotly, plots.DARK)


def render_report(report: ReportInput) -> str:
    figures = report.figures
    context = _contents(report) | {
        "commands": [Markdown(visible(command)) for command in report.commands],
        "verdicts": [(d.quant, Markdown(verdict_table(figures, d, p))) for d, p in figures.pairs],
        "quality": Markdown(quality_text(figures)),
        "groups": bench_groups(figures.bench),
        "speeds": [] if figures.pairs else [Markdown(text) for text in speed_tables(figures)],
        "threads": ", ".join(str(n) for n in dict.fromkeys(r.n_threads for r in figures.bench)),
    }
    return plots.render_markdown("phoneready.report", "report.md.j2", context)


def _contents(report: ReportInput) -> dict[str, Any]:
    figures, notes = report.figures, dict[str, list[str]]()
    exports = (*figures.dense, *figures.shipped)
    for record in figures.bench:  # each remark once, with its rows
        if remark := record.failure or note_of(record):
            notes.setdefault(remark, []).append(f"{record.model_filename} {record.test}")
    return {
        "report": report,
        "figures": figures,
        "headline": headline(figures),
        "details": details(figures),
        "beaten": beaten(figures),
        "losses": losses_table(figures),
        "measured_on": measured_on(figures.losses) if figures.losses else "",
        "standings": WHAT_STANDINGS_MEAN,
        "title": f"{figures.source.name}, {figures.word or 'quantized'}",
        "quality": quality_table(figures),
        "quality_means": quality_means(figures),
        "quality_note": vocabulary_note(figures.evaluation, ("dense model", f"{figures.word} one")),
        "plan": figures.plan,
        "widths": width_table(figures.plan) if figures.plan else None,
        "vocabulary": vocabulary_table(figures.plan) if figures.plan else None,
        "answers": _answers(figures),
        "proof": proof_table(exports),
        "warnings": [(r.file, warning) for r in exports for warning in r.warnings],
        "notes": [f"{remark}: {', '.join(names)}" for remark, names in notes.items()],
        "bytes": format_bytes,
        "text_name": text_name,
    }


# Sentences.

_WORTH = {
    BETTER: "is better than",
    WORSE: "is worse than",
    NO_DIFFERENCE: "is as good as",
    INCONCLUSIVE: "against",
}
"""What a file is beside another one, by its judgement; as good means that the interval lies within 3 %."""


def headline(figures: ReleaseFigures) -> str:
    """What the first file is worth, in one sentence: against the best dense one that is no larger, or the model."""
    first = figures.shipped[0]
    one, at = figures.losses_of(first.file), f"At {megabytes(first.file_bytes)} the {first.quant} file"
    if not figures.pairs:
        if one is None:
            return f"The {first.quant} file has {megabytes(first.file_bytes)}."
        more = one.bits_per_byte / one.dense_bits_per_byte - 1
        return f"{at} has {more:+.1%} bits per byte, KL {one.kl_mean:.3f}, against the model in float32."
    dense, pruned = figures.pairs[0]
    at = at.replace("the ", f"the {figures.word} ", 1)
    # Mixtures of a size differ by some bytes.
    rivals = [
        other
        for other in figures.losses
        if one
        and other.is_dense
        and other.family == one.family
        and other.file_bytes <= 1.005 * one.file_bytes
    ]
    rival = figures.losses_of(dense.file)
    said = [f"{at} is {1 - pruned.file_bytes / dense.file_bytes:.0%} smaller than the dense one"]
    if one and (beside := rivals or [other for other in (rival,) if other]):
        tested = choose_and_test(beside, [one])
        assert tested is not None
        rival, found = figures.losses_of(tested.first), tested.found
        more = (found.value or 1.0) - 1
        bits = f"{abs(more):.1%} {'fewer' if more < 0 else 'more'} bits per byte"
        if rivals and rival:
            named = f"the {rival.label} file ({megabytes(rival.file_bytes)})"
            said = [f"{at} {_WORTH[found.verdict]} {named}"]
        said = [f"{said[0]}: {bits}", *([INCONCLUSIVE] if found.verdict == INCONCLUSIVE else [])]
    for group in bench_groups(figures.bench)[:1]:
        tests = [key for key in group.main_tests() if key[0].startswith("tg")] or group.main_tests()
        for test in tests[:1]:
            a, b = (group.find(file, *test) for file in (rival.file if rival else dense.file, pruned.file))
            speed = compare_records(a, b) if a and b and plots.usable(a) and plots.usable(b) else None
            if isinstance(speed, Comparison):
                decided = {"faster": f"{speed.ratio or 0:.2f} times as fast", "no difference": "as fast"}
                decided["slower"] = decided["faster"]
                said.append(decided.get(speed.verdict, "speed not decided"))
    return f"{', '.join(said)}."


def details(figures: ReleaseFigures) -> str:
    """What went, and what that costs the checkpoint, in one sentence."""
    parts = (
        [figures.plan.removed]
        if figures.plan
        else ["nothing removed or trained: the model itself, quantized"]
    )
    for text in figures.evaluation.texts:
        if text.against is None:
            continue
        if text.distance:
            parts.append(
                f"on {text.kind} the checkpoint's perplexity is {text.perplexity / text.against.perplexity:.3f} "
                "times the dense model's "
                f"and the first choice is the same for {text.distance.same_top1:.1%} of the tokens"
            )
        else:
            ratio = text.bits_per_byte / text.against.bits_per_byte
            parts.append(
                f"on {text.kind} the checkpoint's bits per byte are {ratio:.4f} times the dense model's"
            )
    return "; ".join(parts) + "."


def beaten(figures: ReleaseFigures) -> list[str]:
    """For every file that ships and that another one of the release dominates, a sentence."""
    sentences = []
    for ours in (one for one in figures.losses if not one.is_dense):
        where = figures.standings[ours.file]
        best = figures.losses_of(where.by)
        if where.verdict == DOMINATED and best is not None:
            sizes = f"{format_bytes(best.file_bytes)} against {format_bytes(ours.file_bytes)}"
            losses = f"{best.bits_per_byte:.4f} bits per byte against {ours.bits_per_byte:.4f}"
            sentences.append(f"The {best.label} file dominates the {ours.label} file: {sizes}, {losses}.")
    return sentences


def quality_text(figures: ReleaseFigures) -> str:
    """What ships, before quantization."""
    return quality_table(figures).markdown() or "Nothing was evaluated.\n"


def quality_means(figures: ReleaseFigures) -> str:
    """What is in the table of quality, in words."""
    if figures.plan is None:
        return "The model before quantization, as its checkpoint is."
    return (
        f"The {figures.word} checkpoint against the dense one, before quantization, on the same windows of text. KL is "
        "KL(dense || model) in nats per token; same top-1 is the share of tokens for which both put the same first."
    )


def text_name(reference: str, seed: int) -> str:
    if reference == "self":
        return f"sampled from the dense model, seed {seed}"
    return Path(reference).name if Path(reference).exists() else reference


def _sides(figures: ReleaseFigures) -> tuple[str, str]:
    """What the dense model and the one that ships are called."""
    return ("dense", figures.word or "model")


_Said: TypeAlias = tuple[str, str, str | None]
"""What a model is called, its answer, and why that is degenerate."""


def _answers(figures: ReleaseFigures) -> list[tuple[str, list[tuple[str, list[_Said]]]]]:
    """Question by question: who was asked, and what each side of it said."""
    said, of = figures.answers.answers, figures.evaluation
    why = of.degeneration
    models = [
        ("dense", of.against_answers, why.against_reasons if why else ()),
        (figures.word or "model", of.answers, why.reasons if why else ()),
    ][0 if figures.pairs else 1 :]
    questions = []
    for i, prompt in enumerate(figures.answers.prompts):
        asked: list[tuple[str, list[_Said]]] = []
        if all(i < len(texts) for _, texts, _ in models):
            sides = [(name, texts[i], reasons[i] if reasons else None) for name, texts, reasons in models]
            asked.append(("checkpoint, in torch", sides))
        for pair in figures.pairs or [(record,) for record in figures.shipped]:
            sides = [(name, said[one.file][i], None) for (name, *_), one in zip(models, pair, strict=True)]
            asked.append((f"{pair[0].quant} file", sides))
        questions.append((prompt, asked))
    return questions


# Tables: Markdown is laid out from the same cells as the page.


def verdict_rows(verdicts: Sequence[BudgetVerdict]) -> Table[Row]:
    """Budgets, the worst outcome first."""
    worst_first = sorted(verdicts, key=lambda v: OUTCOMES.index(v.outcome) if v.outcome in OUTCOMES else 0)
    rows = [
        (
            Mark(v.outcome, TONES.get(v.outcome, "unsure")),
            v.metric,
            v.subject + (f" on {v.target}" if v.target else ""),
            v.limit,
            v.figure(),
            v.reason,
        )
        for v in worst_first
    ]
    return table_of_cells(("outcome", "metric", "of", "budget", "found", "reason"), rows, words=6)


def verdict_table(figures: ReleaseFigures, dense: ExportRecord, pruned: ExportRecord) -> str:
    """One quantization: size, perplexity, speed and memory of both files; a table for each place but this machine."""
    groups = bench_groups(figures.bench)
    here = next((group for group in groups if (group.kind, group.target) == ("measured", "local")), None)
    parts = [comparison_table(figures, here, dense, pruned).markdown()]
    for group in groups:
        rows = [] if group is here else _bench_rows(group, dense.file, pruned.file)
        if rows:
            table = table_of_cells(_compared(figures), rows).markdown()
            parts.append(f"{escape_markdown(group.title)}:\n\n{table}")
    return "\n".join(parts)


def speed_tables(figures: ReleaseFigures) -> list[str]:
    """Every place with its files and workloads."""
    groups = bench_groups(figures.bench)
    return [f"{escape_markdown(one.title)}:\n\n{group_table(figures, one).markdown()}" for one in groups]


def _compared(figures: ReleaseFigures) -> tuple[str, ...]:
    return ("", "dense", figures.word, f"{figures.word} / dense")


def losses_table(figures: ReleaseFigures) -> Table[FileLosses]:
    """What every file loses on the same text, the smallest first, and how it stands to those that are no larger."""
    files = sorted(figures.losses, key=lambda one: (one.file_bytes, one.file))
    columns: list[Column[FileLosses]] = [
        Column("file", lambda one: one.label),
        Column("size", lambda one: format_bytes(one.file_bytes), right=True),
        *loss_columns(files),
        standing_column(files, figures.standings),
    ]
    return Table(columns, files)


def comparison_table(
    figures: ReleaseFigures, group: BenchGroup | None, dense: ExportRecord, pruned: ExportRecord
) -> Table[Row]:
    """One quantization: both files, their ratio, and what the samples allow to say."""
    rows = [_ratio_row(METRICS["file_bytes"].title, dense.file_bytes, pruned.file_bytes, format_bytes)]
    before, now = (figures.losses_of(record.file) for record in (dense, pruned))
    if before and now:
        for metric in ("bits_per_byte", "tokens_per_byte"):
            sides = getattr(before, metric), getattr(now, metric)
            if metric == "bits_per_byte" or len({*sides}) > 1:
                rows.append(_ratio_row(f"{METRICS[metric].title} of the file", *sides, "{:.4f}".format))
    rows += _bench_rows(group, dense.file, pruned.file) if group else []
    return table_of_cells(_compared(figures), rows)


def _bench_rows(group: BenchGroup, dense: str, pruned: str) -> list[Row]:
    rows = list[Row]()
    for a, b in group.pairs(dense, pruned):
        title = METRICS[a.workload].title + (f", {a.test}" if METRICS[a.workload].sized else "")
        title += f", {a.n_threads} thread" + ("s" if a.n_threads > 1 else "")
        speeds, mark = (speed_text(a), speed_text(b)), Mark("void", "bad")
        if not (a.ok and b.ok):
            rows.append((title, *("measured" if r.ok else "failed" for r in (a, b)), NOTHING))
            continue
        if plots.usable(a) and plots.usable(b):
            c = compare_records(a, b)
            if isinstance(c, Incomparable):
                mark = Mark(NOT_COMPARABLE, "unsure", c.reason)
            elif c.ratio is None:
                mark = Mark(c.verdict, TONES[c.verdict], c.reason or "")
            else:
                basis = ", by processor time" if c.basis == "cpu" else ""
                basis += "" if c.confidence == CONFIDENCE else f", {c.confidence:.0%} interval"
                why = f"{c.ratio:.2f} times as fast ({c.low:.2f} to {c.high:.2f}){basis}"
                speeds, mark = speeds_text(c), Mark(c.verdict, TONES[c.verdict], why)
        rows.append((title, *speeds, mark))
    before, now = group.peak_rss_bytes(dense), group.peak_rss_bytes(pruned)
    if before and now:
        rows.append(_ratio_row(METRICS["peak_rss_bytes"].title, before, now, format_bytes))
    return rows


def _ratio_row(name: str, dense: float, pruned: float, show: Callable[[Any], str]) -> Row:
    return (name, show(dense), show(pruned), f"{pruned / dense:.3f}")


def quality_table(figures: ReleaseFigures) -> Table[TextLoss]:
    """What ships, before quantization, against the dense model if that is another one."""
    of = figures.evaluation
    return text_table(of, _sides(figures), lambda one: f"{one.kind}: {text_name(one.source, of.seed)}")


def proof_table(records: Sequence[ExportRecord]) -> Table[ExportRecord]:
    """Each file against the checkpoint that it was made from."""
    columns: tuple[Column[ExportRecord], ...] = (
        Column("file", lambda r: r.file),
        Column(
            "stored types", lambda r: ", ".join(f"{n} {kind}" for kind, n in sorted(r.tensor_types.items()))
        ),
        Column("size", lambda r: format_bytes(r.file_bytes), right=True),
        Column("max logit diff.", lambda r: f"{r.parity.max_logit_diff:.2g}", right=True),
        Column("KL mean", lambda r: f"{r.parity.kl_mean:.4f}", right=True),
        Column("KL p99.9", lambda r: f"{r.parity.kl_p99_9:.3f}", right=True),
        Column("same top-1", lambda r: f"{r.parity.same_top1:.1%}", right=True),
        Column("perplexity ratio", lambda r: f"{r.parity.ppl_ratio:.4f}", right=True),
        Column(
            "limits held", lambda r: ", ".join(f"{k} {v:g}" for k, v in r.parity.limits.items()) or None, True
        ),
    )
    return Table(columns, records)


def width_table(plan: PruningPlan) -> Table[Row]:
    """Every block's width and importance; what is left of its attention, or that it goes, if any does."""
    widths, removal = plan.dense_shape.ffn_widths, plan.kv_groups
    columns = {
        "block": [str(index) for index in range(len(widths))],
        "dense": [str(width) for width in widths],
        "kept": [str(block.width) for block in plan.blocks],
        "share": [f"{block.width / dense:.3f}" for block, dense in zip(plan.blocks, widths, strict=True)],
        "importance": [f"{block.importance:.4f}" for block in plan.blocks],
    }
    if plan.gone or plan.silent or plan.narrowed:
        attention = []
        for index, dense in enumerate(plan.dense_shape.blocks):
            if index in plan.gone:
                attention.append("block removed")
            elif not dense.has_attention or index in plan.silent:
                attention.append("no attention")
            elif removal:
                kept, groups = len(removal.kept[index]), len(removal.losses[index])
                attention.append(f"{kept} of {groups} KV groups")
            else:
                attention.append("whole")
        columns["attention"] = attention
    return table_of_cells(tuple(columns), list(zip(*columns.values(), strict=True)), words=0)


def vocabulary_table(plan: PruningPlan) -> Table[Row] | None:
    """What is kept of every script and of rare and common tokens; None if all tokens stay."""
    if plan.vocabulary is None:
        return None
    rows = [
        (
            kind.name,
            str(kind.tokens),
            str(kind.kept),
            f"{kind.share:.2%}",
            f"{kind.share - kind.kept_share:.3%}",
        )
        for kind in plan.vocabulary.by_script
    ]
    return table_of_cells(("tokens", "dense", "kept", "of the text", "of it now in parts"), rows)


def group_table(figures: ReleaseFigures, group: BenchGroup) -> Table[Row]:
    """Files in rows, workloads in columns, of one kind and target."""
    files = {r.file: (r.quant, r) for r in figures.shipped}
    files |= {r.file: (f"dense {r.quant}", r) for r in figures.dense}
    rows: list[Row] = []
    for file in group.files:
        name, export = files.get(file, (file, None))
        cells = [name, format_bytes(export.file_bytes) if export else NOTHING]
        for key in group.tests:
            record = group.find(file, *key)
            found = unfair(record) if record else None
            speed = speed_text(record) + (f" ({found.verdict})" if found else "") if record else NOTHING
            cells.append(speed if record is None or record.ok else "failed")
        verdicts = {r.memory_verdict for r in group.records if r.model_filename == file and r.memory_verdict}
        rows.append((*cells, ", ".join([format_bytes(group.peak_rss_bytes(file)), *sorted(verdicts)])))
    tests = [f"{test}, {threads} thr." for test, threads in group.tests]
    return table_of_cells(("file", "size", *tests, "peak memory"), rows)


def record_table(group: BenchGroup) -> Table[Row]:
    """Every record of a group, failed ones with their reason; with joules per token, or why there are none."""
    rows: list[Row] = []
    metered = any(r.energy for r in group.records)
    for r in group.records:
        outcome: Cell = speed_text(r) if r.ok else Mark("failed", "bad", r.failure or "no reason")
        if r.void:
            outcome = Mark("void", "bad", f"writes degenerate text: {r.degenerate}")
        memory = format_bytes(r.peak_rss_bytes) + (f", {r.memory_verdict}" if r.memory_verdict else "")
        spread = NOTHING if r.spread is None else f"{r.spread:.2f}"
        found, account = fairness(r), energy(r) if metered else None
        conditions: Cell = Mark(found.text, TONES[found.verdict]) if unfair(r) else found.text
        cells = [r.model_filename, r.test, f"{r.n_threads}", outcome, f"{len(r.samples_ns)}", spread, memory]
        cells.append(conditions)
        if metered and account is not None and account.joules is not None:
            cells += [energy_text(account) or NOTHING, account.meter]
        elif metered:
            cells += [NOTHING, (account and account.reason) or NOTHING]
        rows.append(cells)
    header = ["file", "test", "threads", "found", "samples", "p90 / p50", "peak memory", "conditions"]
    return table_of_cells([*header, *(["J/token", "energy of"] if metered else [])], rows)


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
