"""The page's tables, as plain cells; the template decides how they look."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from exporters.record import ExportRecord
from phoneready.console import format_bytes
from phoneready.evaluation.record import Evaluation
from phoneready.figures.verdict import OUTCOMES, BudgetVerdict, format_figure
from phoneready.release.results import ReleaseFigures
from phoneready.report.markdown import WORKLOAD_TITLES, ratio_text, text_name
from runtime_bench.presentation.comparison_table import speeds_text
from runtime_bench.presentation.record_table import speed_text
from runtime_bench.records.compare import compare_records
from runtime_bench.records.groups import BenchGroup
from runtime_bench.records.record import BenchRecord

NOTHING = "-"
TONES = {
    **dict(zip(OUTCOMES, ("bad", "unsure", "good"), strict=True)),
    **{
        "faster": "good",
        "slower": "bad",
        "no difference": "even",
        "inconclusive": "unsure",
        "too noisy to tell": "unsure",
    },
}
"""Outcome or verdict to the tone that it is shown in."""


@dataclass(frozen=True)
class Mark:
    """A cell with a word that is set apart.

    Attributes:
        word: The word.
        tone: `good`, `bad`, `even` or `unsure`.
        text: What stands before it.
    """

    word: str
    tone: str
    text: str = ""


Cell: TypeAlias = str | Mark


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        header: Names of the columns.
        rows: Cells.
        words: How many columns from the left are words; the rest are figures, aligned to the right.
        wide: Whether it keeps its columns on a narrow screen and is scrolled; else its rows become cards.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: int = 1
    wide: bool = False


def verdict_rows(verdicts: Sequence[BudgetVerdict]) -> Table:
    """Budgets, the worst outcome first."""
    rows = [
        (
            Mark(v.outcome, TONES.get(v.outcome, "unsure")),
            v.metric,
            v.subject + (f" on {v.target}" if v.target else ""),
            v.limit,
            _value(v),
            v.reason,
        )
        for v in sorted(verdicts, key=_order)
    ]
    return Table(("outcome", "metric", "of", "budget", "found", "reason"), tuple(rows), words=6)


def overview_table(figures: ReleaseFigures, group: BenchGroup | None) -> Table:
    """Every file in a row: size, quality, speed and memory."""
    tests = group.main_tests() if group else []
    header = ["file", "size", "perplexity", "KL to its checkpoint", "same top-1"]
    header += [f"{test}, {threads} thr." for test, threads in tests] + ["peak memory"]
    rows: list[tuple[Cell, ...]] = []
    for dense, pruned in figures.pairs:
        for role, record in (("dense", dense), ("pruned", pruned)):
            p = record.parity
            row = [f"{record.quant} {role}", format_bytes(record.file_bytes), f"{p.ppl_export:.2f}"]
            row += [f"{p.kl_mean:.4f}", f"{p.same_top1:.1%}"]
            row += [_speed_of(group, record.file, *key) for key in tests]
            rows.append((*row, format_bytes(group.peak_rss_bytes(record.file) if group else None)))
    return Table(tuple(header), tuple(rows), wide=True)


def comparison_table(group: BenchGroup | None, dense: ExportRecord, pruned: ExportRecord) -> Table:
    """One quantization: both files, their ratio, and what the samples allow to say."""
    p, q = dense.parity, pruned.parity
    rows: list[tuple[Cell, ...]] = [
        _ratio_row("file size", dense.file_bytes, pruned.file_bytes, format_bytes),
        _ratio_row("perplexity", p.ppl_export, q.ppl_export, "{:.2f}".format),
    ]
    if group:
        peaks = [group.peak_rss_bytes(record.file) for record in (dense, pruned)]
        if peaks[0] and peaks[1]:
            rows.append(_ratio_row("peak memory (RSS)", peaks[0], peaks[1], format_bytes))
        rows += [_speed_row(*pair) for pair in group.pairs(dense.file, pruned.file)]
    return Table(("", "dense", "pruned", "pruned / dense"), tuple(rows))


def quality_rows(evaluation: Evaluation) -> Table | None:
    """The pruned checkpoint against the dense one, before quantization."""
    rows = []
    for text in evaluation.texts:
        d = text.divergence
        if d is None:
            continue
        row = [f"{text.kind}: {text_name(text.source, evaluation.seed)}", f"{d.n_tokens}"]
        row += [f"{d.reference_perplexity:.2f}", f"{d.perplexity:.2f}", f"{d.perplexity_ratio:.3f}"]
        row += [f"{d.kl_mean:.4f}", f"{d.kl_median:.4f}", f"{d.kl_p99_9:.2f}", f"{d.same_top1:.1%}"]
        rows.append(tuple(row))
    header = ("measured on", "tokens", "perplexity dense", "pruned", "ratio", "KL mean", "KL median")
    return Table((*header, "KL p99.9", "same top-1"), tuple(rows)) if rows else None


def evaluation_tables(evaluation: Evaluation) -> list[Table]:
    """Tasks, own metrics and degenerate answers, where they were asked for."""
    return [table for table in (_tasks(evaluation), _metrics(evaluation), _degeneration(evaluation)) if table]


def proof_table(records: Iterable[ExportRecord]) -> Table:
    """Each file against the checkpoint that it was made from."""
    rows = []
    for r in records:
        types = ", ".join(f"{count} {kind}" for kind, count in sorted(r.tensor_types.items()))
        p = r.parity
        limits = ", ".join(f"{name} {value:g}" for name, value in p.limits.items()) or NOTHING
        row = [r.file, types, f"{p.max_logit_diff:.2g}", f"{p.kl_mean:.4f}", f"{p.kl_p99_9:.3f}"]
        rows.append((*row, f"{p.same_top1:.1%}", f"{p.ppl_ratio:.4f}", limits))
    header = (
        "file",
        "stored types",
        "max logit diff.",
        "KL mean",
        "KL p99.9",
        "same top-1",
        "perplexity ratio",
    )
    return Table((*header, "limits held"), tuple(rows), words=2)


def width_rows(figures: ReleaseFigures) -> Table:
    """Every block's width and importance."""
    plan = figures.plan
    rows = [
        (str(i), str(dense), str(block.width), f"{block.width / dense:.3f}", f"{block.importance:.4f}")
        for i, (dense, block) in enumerate(zip(plan.dense_shape.ffn_widths, plan.blocks, strict=True))
    ]
    return Table(("block", "dense", "kept", "share", "importance"), tuple(rows), words=0, wide=True)


def group_table(figures: ReleaseFigures, group: BenchGroup) -> Table:
    """Files in rows, workloads in columns, of one kind and target."""
    roles = {r.file: f"{r.quant} dense" for r in figures.dense} | {
        r.file: f"{r.quant} pruned" for r in figures.pruned
    }
    rows: list[tuple[Cell, ...]] = []
    for file in group.files:
        found = [_speed_of(group, file, *key) for key in group.tests]
        verdicts = {r.memory_verdict for r in group.records if r.model_filename == file and r.memory_verdict}
        memory = ", ".join([format_bytes(group.peak_rss_bytes(file)), *sorted(verdicts)])
        rows.append((roles.get(file, file), *found, memory))
    tests = [f"{test}, {threads} thr." for test, threads in group.tests]
    return Table(("file", *tests, "peak memory"), tuple(rows), wide=True)


def record_table(group: BenchGroup) -> Table:
    """Every record of a group, failed ones with their reason."""
    rows: list[tuple[Cell, ...]] = []
    for r in group.records:
        threads = f"{r.n_threads}"
        found: Cell = speed_text(r) if r.ok else Mark("failed", "bad", r.failure or "no reason")
        if r.void:
            found = Mark("void", "bad", f"writes degenerate text: {r.degenerate}")
        memory = format_bytes(r.peak_rss_bytes) + (f", {r.memory_verdict}" if r.memory_verdict else "")
        spread = NOTHING if r.spread is None else f"{r.spread:.2f}"
        rows.append((r.model_filename, r.test, threads, found, f"{len(r.samples_ns)}", spread, memory))
    header = ("file", "test", "threads", "found", "samples", "p90 / p50", "peak memory")
    return Table(header, tuple(rows), wide=True)


def _order(verdict: BudgetVerdict) -> int:
    return OUTCOMES.index(verdict.outcome) if verdict.outcome in OUTCOMES else 0


def _value(v: BudgetVerdict) -> str:
    found = format_figure(v.value, v.unit)
    if v.low is None or v.high is None:
        return found
    return f"{found} ({format_figure(v.low, v.unit)} to {format_figure(v.high, v.unit)})"


def _speed_of(group: BenchGroup | None, file: str, test: str, threads: int) -> str:
    record = group.find(file, test, threads) if group else None
    if record is None:
        return NOTHING
    return speed_text(record) if record.ok else "failed"


def _ratio_row(name: str, dense: float, pruned: float, show: Callable[[float], str]) -> tuple[Cell, ...]:
    return (name, show(dense), show(pruned), f"{pruned / dense:.3f}")


def _speed_row(dense: BenchRecord, pruned: BenchRecord) -> tuple[Cell, ...]:
    title = "loading" if dense.workload == "load" else f"{WORKLOAD_TITLES[dense.workload]}, {dense.test}"
    title += f", {dense.n_threads} thread" + ("s" if dense.n_threads > 1 else "")
    if not (dense.ok and pruned.ok):
        return (title, *("measured" if r.ok else "failed" for r in (dense, pruned)), NOTHING)
    if dense.void or pruned.void:
        return (title, speed_text(dense), speed_text(pruned), Mark("void", "bad"))
    c = compare_records(dense, pruned)
    if c.ratio is None:
        return (
            title,
            speed_text(dense),
            speed_text(pruned),
            Mark(c.verdict, TONES[c.verdict], c.reason or ""),
        )
    return (title, *speeds_text(c), Mark(c.verdict, TONES[c.verdict], ratio_text(c)))


def _tasks(evaluation: Evaluation) -> Table | None:
    rows = []
    for index, task in enumerate(evaluation.tasks):
        for number, metric in enumerate(task.metrics):
            error = NOTHING if metric.stderr is None else f"{metric.stderr:.4f}"
            row = [f"{task.task}, {metric.name}", f"{task.n_items}", f"{metric.value:.4f}", error]
            others = evaluation.against_tasks
            other = f"{others[index].metrics[number].value:.4f}" if others else NOTHING
            rows.append((*row, other))
    return Table(("task", "items", "pruned", "standard error", "dense"), tuple(rows)) if rows else None


def _metrics(evaluation: Evaluation) -> Table | None:
    rows = tuple((metric.name, f"{metric.value:.6g}") for metric in evaluation.metrics)
    return Table(("own metric", "pruned"), rows) if rows else None


def _degeneration(evaluation: Evaluation) -> Table | None:
    found = evaluation.degeneration
    if found is None:
        return None

    def row(name: str, ours: Mapping[str, float], theirs: Mapping[str, float], key: str) -> tuple[Cell, ...]:
        dense = NOTHING if found.against_share is None else f"{theirs.get(key, 0.0):.1%}"
        return (name, f"{ours.get(key, 0.0):.1%}", dense)

    reasons = sorted({*found.by_reason, *found.against_by_reason})
    rows = [row(reason, found.by_reason, found.against_by_reason, reason) for reason in reasons]
    total = ({"": found.share}, {"": found.against_share or 0.0})
    rows.append(row(f"all, of {found.n_prompts} answers", *total, ""))
    return Table(("degenerate answers", "pruned", "dense"), tuple(rows))
