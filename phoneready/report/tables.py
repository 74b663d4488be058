"""The tables of both reports: the Markdown is laid out from the same cells as the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cfsp.pruning.plan import PruningPlan
from cfsp.units import format_bytes
from exporters.export_record import ExportRecord
from phoneready.evaluation.evaluation_record import Evaluation, TextResult
from phoneready.evaluation.tables import loss_columns, standing_column, text_table
from phoneready.figures.figures import METRICS, OUTCOMES, BudgetVerdict
from phoneready.release.results import ReleaseFigures
from phoneready.release.steps import FileLosses
from runtime_bench.presentation.comparison_table import NOT_COMPARABLE, speeds_text
from runtime_bench.presentation.record_table import energy_text, speed_text
from runtime_bench.presentation.table import Column, Table, table_of_cells
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.compare import Incomparable, compare_records
from runtime_bench.records.energy import energy
from runtime_bench.records.fairness import DISTURBED, THROTTLED, fairness, unfair
from runtime_bench.records.groups import BenchGroup
from runtime_bench.records.summary import CONFIDENCE

NOTHING = "-"
TONES = {
    **dict(zip(OUTCOMES, ("bad", "unsure", "good"), strict=True)),
    **{"faster": "good", "slower": "bad", "no difference": "even", "too noisy to tell": "unsure"},
    **{THROTTLED: "bad", DISTURBED: "unsure"},
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

    def __str__(self) -> str:
        return f"{self.text}: {self.word}" if self.text else self.word


Cell: TypeAlias = str | Mark
Row: TypeAlias = Sequence[Cell]
COMPARED = ("", "dense", "pruned", "pruned / dense")


def verdict_rows(verdicts: Sequence[BudgetVerdict]) -> Table[Row]:
    """Budgets, the worst outcome first."""
    rows = [
        (
            Mark(v.outcome, TONES.get(v.outcome, "unsure")),
            v.metric,
            v.subject + (f" on {v.target}" if v.target else ""),
            v.limit,
            v.figure(),
            v.reason,
        )
        for v in sorted(verdicts, key=_order)
    ]
    return table_of_cells(("outcome", "metric", "of", "budget", "found", "reason"), rows, words=6)


def overview_table(figures: ReleaseFigures, group: BenchGroup | None) -> Table[Row]:
    """Every file in a row: size, speed and memory."""
    tests = group.main_tests() if group else []
    header = ["file", "size"]
    header += [f"{test}, {threads} thr." for test, threads in tests] + ["peak memory"]
    rows: list[Row] = []
    for dense, pruned in figures.pairs:
        for role, record in (("dense", dense), ("pruned", pruned)):
            row = [f"{role} {record.quant}", format_bytes(record.file_bytes)]
            row += [_speed_of(group, record.file, *key) for key in tests]
            rows.append((*row, format_bytes(group.peak_rss_bytes(record.file) if group else None)))
    return table_of_cells(tuple(header), rows)


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
    return table_of_cells(COMPARED, [*rows, *bench_rows(group, dense.file, pruned.file)])


def bench_rows(group: BenchGroup | None, dense: str, pruned: str) -> list[Row]:
    """Speeds and memory of two files at one place."""
    if group is None:
        return []
    rows = [_speed_row(*pair) for pair in group.pairs(dense, pruned)]
    before, now = group.peak_rss_bytes(dense), group.peak_rss_bytes(pruned)
    if before and now:
        rows.append(_ratio_row(METRICS["peak_rss_bytes"].title, before, now, format_bytes))
    return rows


def quality_table(evaluation: Evaluation) -> Table[TextResult]:
    """The pruned checkpoint against the dense one, before quantization."""

    def called(text: TextResult) -> str:
        return f"{text.kind}: {text_name(text.source, evaluation.seed)}"

    return text_table(evaluation, SIDES, called)


SIDES = ("dense", "pruned")
_PROOF: tuple[Column[ExportRecord], ...] = (
    Column("file", lambda r: r.file),
    Column("stored types", lambda r: ", ".join(f"{n} {kind}" for kind, n in sorted(r.tensor_types.items()))),
    Column("size", lambda r: format_bytes(r.file_bytes), right=True),
    Column("max logit diff.", lambda r: f"{r.parity.max_logit_diff:.2g}", right=True),
    Column("KL mean", lambda r: f"{r.parity.kl_mean:.4f}", right=True),
    Column("KL p99.9", lambda r: f"{r.parity.kl_p99_9:.3f}", right=True),
    Column("same top-1", lambda r: f"{r.parity.same_top1:.1%}", right=True),
    Column("perplexity ratio", lambda r: f"{r.parity.ppl_ratio:.4f}", right=True),
    Column(
        "limits held",
        lambda r: ", ".join(f"{k} {v:g}" for k, v in r.parity.limits.items()) or None,
        right=True,
    ),
)


def proof_table(records: Sequence[ExportRecord]) -> Table[ExportRecord]:
    """Each file against the checkpoint that it was made from."""
    return Table(_PROOF, records)


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
    roles = {r.file: f"dense {r.quant}" for r in figures.dense} | {
        r.file: f"pruned {r.quant}" for r in figures.pruned
    }
    rows: list[Row] = []
    for file in group.files:
        speeds = [_speed_of(group, file, *key) for key in group.tests]
        verdicts = {r.memory_verdict for r in group.records if r.model_filename == file and r.memory_verdict}
        memory = ", ".join([format_bytes(group.peak_rss_bytes(file)), *sorted(verdicts)])
        rows.append((roles.get(file, file), *speeds, memory))
    tests = [f"{test}, {threads} thr." for test, threads in group.tests]
    return table_of_cells(("file", *tests, "peak memory"), rows)


def record_table(group: BenchGroup) -> Table[Row]:
    """Every record of a group, failed ones with their reason."""
    rows: list[Row] = []
    metered = any(r.energy for r in group.records)
    for r in group.records:
        threads = f"{r.n_threads}"
        outcome: Cell = speed_text(r) if r.ok else Mark("failed", "bad", r.failure or "no reason")
        if r.void:
            outcome = Mark("void", "bad", f"writes degenerate text: {r.degenerate}")
        memory = format_bytes(r.peak_rss_bytes) + (f", {r.memory_verdict}" if r.memory_verdict else "")
        spread = NOTHING if r.spread is None else f"{r.spread:.2f}"
        found = fairness(r)
        conditions: Cell = Mark(found.text, TONES[found.verdict]) if unfair(r) else found.text
        samples = f"{len(r.samples_ns)}"
        row = (r.model_filename, r.test, threads, outcome, samples, spread, memory, conditions)
        rows.append((*row, *_energy_cells(r)) if metered else row)
    header = ("file", "test", "threads", "found", "samples", "p90 / p50", "peak memory", "conditions")
    return table_of_cells((*header, *(_ENERGY if metered else ())), rows)


_ENERGY = ("J/token", "energy of")


def _energy_cells(record: BenchRecord) -> tuple[Cell, ...]:
    """Joules a token with what they lie between, or why there are none."""
    found = energy(record)
    if found is None or found.joules is None:
        return (NOTHING, (found and found.reason) or NOTHING)
    return (energy_text(found) or NOTHING, found.meter)


def _order(verdict: BudgetVerdict) -> int:
    return OUTCOMES.index(verdict.outcome) if verdict.outcome in OUTCOMES else 0


def _speed_of(group: BenchGroup | None, file: str, test: str, threads: int) -> str:
    record = group.find(file, test, threads) if group else None
    if record is None:
        return NOTHING
    found = unfair(record)
    return (speed_text(record) + (f" ({found.verdict})" if found else "")) if record.ok else "failed"


def _ratio_row(name: str, dense: float, pruned: float, show: Callable[[float], str]) -> Row:
    return (name, show(dense), show(pruned), f"{pruned / dense:.3f}")


def _speed_row(dense: BenchRecord, pruned: BenchRecord) -> Row:
    title = METRICS[dense.workload].title
    title += f", {dense.test}" if METRICS[dense.workload].sized else ""
    title += f", {dense.n_threads} thread" + ("s" if dense.n_threads > 1 else "")
    if not (dense.ok and pruned.ok):
        return (title, *("measured" if r.ok else "failed" for r in (dense, pruned)), NOTHING)
    speeds = (speed_text(dense), speed_text(pruned))
    if dense.void or pruned.void:
        return (title, *speeds, Mark("void", "bad"))
    c = compare_records(dense, pruned)
    if isinstance(c, Incomparable):
        return (title, *speeds, Mark(NOT_COMPARABLE, "unsure", c.reason))
    why = c.reason or ""
    if c.ratio is not None:
        basis = ", by processor time" if c.basis == "cpu" else ""
        basis += "" if c.confidence == CONFIDENCE else f", {c.confidence:.0%} interval"
        speeds, why = speeds_text(c), f"{c.ratio:.2f} times as fast ({c.low:.2f} to {c.high:.2f}){basis}"
    return (title, *speeds, Mark(c.verdict, TONES[c.verdict], why))


def text_name(reference: str, seed: int) -> str:
    """What a text reference is called in reports."""
    if reference == "self":
        return f"sampled from the dense model, seed {seed}"
    return Path(reference).name if Path(reference).exists() else reference
