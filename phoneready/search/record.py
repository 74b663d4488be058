"""search.json, and what search.md and search.html show of it: the verdict in sentences, the table, plots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from cfsp.errors import InputError
from cfsp.units import format_bytes, megabytes
from cfsp.validation import Share
from exporters.export_record import ExportRecord
from phoneready.evaluation.measured_file import (
    DOMINATED,
    MeasuredFile,
    Standing,
    Tested,
    choose,
    choose_and_test,
    telling_sizes,
)
from phoneready.evaluation.tables import WHAT_STANDINGS_MEAN, loss_columns, measured_on, standing_column
from phoneready.figures.figures import INCONCLUSIVE, MISSED, PASS, BudgetConfig, BudgetVerdict, Figure
from phoneready.report.plots import BITS, DARK, Axis, loss_figure, plotly_script, render_page, speed_span
from phoneready.search.point import Point
from phoneready.settings.schema import ReleaseConfig
from runtime_bench.presentation.table import Column, Table, escape_markdown
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.compare import BETTER, NO_DIFFERENCE, WORSE
from runtime_bench.records.fairness import has_speed
from runtime_bench.targets.table import target_details


@dataclass(frozen=True)
class EvaluatedPoint(MeasuredFile):
    """A file, which may have been deleted, and its figures.

    `export` says how it was made and proven, `removed` is the share of FFN channels, after alignment, `broken` why
    what it writes is no text; speed and memory are measured (`bench`) or `projected` to a device.
    """

    KIND: ClassVar[str] = "search-point"
    SCHEMA_VERSION: ClassVar[int] = 3

    point: Point
    sha256: str
    export: ExportRecord
    removed: Share
    broken: str | None = None
    bench: BenchRecord | None = None
    projected: tuple[Figure, ...] = ()

    def __post_init__(self) -> None:
        if Path(self.file).name != self.file or not self.file.endswith(".gguf"):  # it may be deleted
            raise InputError("not the name of a GGUF file", field="file", value=self.file)

    @property
    def is_dense(self) -> bool:
        return self.point.is_dense

    @property
    def label(self) -> str:
        return self.point.label

    @property
    def bits_ratio(self) -> float:
        """Bits per byte, times the dense model's in float32."""
        return self.bits_per_byte / self.dense_bits_per_byte

    @property
    def decode(self) -> tuple[float, float] | None:
        """Tokens per second of the slowest and the fastest tenth, or the projected band."""
        if self.bench is not None:
            return speed_span(self.bench)[1:] if has_speed(self.bench) else None
        for one in self.projected:
            if one.unit == "t/s" and one.low is not None and one.high is not None:
                return one.low, one.high
        return None

    @property
    def memory_bytes(self) -> float | None:
        if self.bench is not None:
            return self.bench.peak_rss_bytes
        return next((one.value for one in self.projected if one.unit == "bytes"), None)


@dataclass(frozen=True)
class SearchRecord:
    """search.json: all files that were measured, by size; for each the verdicts of the limits (`held`) and how it
    stands to files that are no larger; the best within all limits, and the dense model's best; what was not made or
    failed, and why. `base` is a release without limits, whose model and text all files have."""

    KIND: ClassVar[str] = "search"
    SCHEMA_VERSION: ClassVar[int] = 4

    base: ReleaseConfig
    source_sha256: str | None
    limits: tuple[BudgetConfig, ...]
    sources: tuple[tuple[str, str], ...]
    place: str | None
    points: tuple[EvaluatedPoint, ...]
    held: tuple[tuple[BudgetVerdict, ...], ...]
    standings: tuple[Standing, ...]
    best: str | None
    best_dense: str | None
    left_out: tuple[str, ...]
    failed: tuple[str, ...]
    kept: tuple[str, ...]

    @property
    def source(self) -> str:
        return self.base.model.reference

    @property
    def asked(self) -> str:
        """The limits, in words."""
        return ", ".join(f"{one.metric} {one.describe()}" for one in self.limits)

    def find(self, file: str | None) -> EvaluatedPoint | None:
        return next((point for point in self.points if point.file == file), None)

    @property
    def outcome(self) -> str:
        """Whether a file is within all limits: `pass`; `inconclusive` if one may be; `missed`."""
        each = [outcome_of(held) for held in self.held]
        return next((one for one in (PASS, INCONCLUSIVE) if one in each), MISSED)


def outcome_of(held: Sequence[BudgetVerdict]) -> str:
    """The worst; a limit on what was not measured is not met."""
    each = [one.outcome for one in held]
    return next((one for one in (MISSED, INCONCLUSIVE) if one in each), PASS)


def format_search(found: SearchRecord) -> str:
    parts = [f"{line}\n" for line in sentences(found)]
    parts += [search_table(found).markdown(), escape_markdown(conditions(found))]
    for title, rows in (("Not made", found.left_out), ("Failed", found.failed)):
        parts += ["", f"{title}:", "", *(f"- {escape_markdown(row)}" for row in rows)] if rows else []
    if found.kept:
        parts += ["", f"Kept: {', '.join(found.kept)}."]
    return "\n".join(parts) + "\n"


def search_table(found: SearchRecord) -> Table[EvaluatedPoint]:
    """One row a file, the smallest first."""
    held = {one.file: rows for one, rows in zip(found.points, found.held, strict=True)}

    def decode(one: EvaluatedPoint) -> str | None:
        if (span := one.decode) is None:
            return "failed" if one.bench else None
        return f"{span[0]:.1f} to {span[1]:.1f} t/s"

    def limits(one: EvaluatedPoint) -> str:
        wrong = [
            f"{h.outcome}: {h.metric} {h.limit} ({h.figure()})" for h in held[one.file] if h.outcome != PASS
        ]
        return "; ".join([*wrong, *(["writes no text"] if one.broken else [])]) or "within"

    columns: list[Column[Any]] = [
        Column("model", lambda one: one.point.model),
        Column("file", lambda one: one.point.quant),
        Column("size", lambda one: megabytes(one.file_bytes), right=True),
        *loss_columns(found.points),
    ]
    if found.place:
        columns += [
            Column("decode", decode, right=True),
            Column("memory", lambda one: format_bytes(one.memory_bytes), right=True),
        ]
    columns += [Column("limits", limits)] if found.limits else []
    standings = {one.file: one for one in found.standings}
    return Table([*columns, standing_column(found.points, standings)], found.points)


def conditions(found: SearchRecord) -> str:
    if not found.points:
        return "Nothing was measured."
    how = "projected to" if found.points[0].projected else "measured at"
    place = f" Decode and memory are {how} {found.place}." if found.place else ""
    if found.place and how == "measured at" and target_details(found.place):
        place += f" Files stay in its cache until `phoneready devices clean {found.place}`."
    return f"{measured_on(found.points)}{place} {WHAT_STANDINGS_MEAN}"


def sentences(found: SearchRecord) -> Iterator[str]:
    """The verdict: the best file, how much better it is than the best dense one, and whether pruning pays."""
    limits, best, dense = found.asked, found.find(found.best), found.find(found.best_dense)
    if found.limits and best is None:
        # Of those that miss the fewest limits, the one that loses least.
        missed = [sum(one.outcome != PASS for one in held) for held in found.held]
        ranked = zip(
            missed, (one.bits_per_byte for one in found.points), map(_named, found.points), strict=True
        )
        nearest = min(ranked, default=None)
        yield f"No file is within {limits}" + (f"; nearest is {nearest[2]}." if nearest else ".")
    elif found.limits and best is not None:
        yield f"The best file within {limits} is {_named(best)}."
        if best.broken:
            yield f"What it writes is no text ({best.broken}), and no other file within the limits writes any."
        if best.is_dense:
            tried = any(not one.is_dense for one in found.points)
            yield "No pruned file within it loses less." if tried else "No pruned file was made."
        elif dense is None:
            yield "Pruning paid: no quantization of the dense model is within the limits."
        else:
            yield _of_pruning(found, choose_and_test(*_within(found)))
    for choice in () if found.limits else (choose(found.points, n) for n in telling_sizes(found.points)):
        one, other = found.find(choice.best), found.find(choice.dense)
        if one is not None:
            rest = (
                "nothing pruned is better there."
                if one is other
                else "no quantization of the dense model gets there."
                if other is None
                else _of_pruning(found, choice.tested)
            )
            yield f"- At {megabytes(choice.at_bytes)} the best file is {_named(one)}: {rest}"
    files = {one.file: one for one in found.points}
    pruned = [one for one in found.standings if not files[one.file].is_dense]
    beaten = [one for one in pruned if one.verdict == DOMINATED and one.by and files[one.by].is_dense]
    if pruned and len(beaten) == len(pruned):
        yield (
            "Pruning does not pay here: every pruned file is dominated by a dense quantization, "
            "which is no larger and loses no more. Quantize the dense model instead."
        )
    elif pruned:
        yield f"{len(beaten)} of {len(pruned)} pruned files are dominated by a dense quantization."


def _named(one: EvaluatedPoint) -> str:
    return (
        f"{one.label} ({megabytes(one.file_bytes)}, {one.bits_per_byte:.4f} bits per byte, "
        f"{one.bits_ratio - 1:+.1%})"
    )


def _within(found: SearchRecord) -> tuple[list[EvaluatedPoint], list[EvaluatedPoint]]:
    """Dense and pruned files within all limits."""
    pairs = zip(found.points, found.held, strict=True)
    fitting = [one for one, held in pairs if outcome_of(held) == PASS]
    return [one for one in fitting if one.is_dense], [one for one in fitting if not one.is_dense]


_PAID = {
    BETTER: "Pruning paid",
    WORSE: "Pruning did not pay",
    NO_DIFFERENCE: "Pruning makes no difference",
    INCONCLUSIVE: "Whether pruning paid is inconclusive",
}


def _of_pruning(found: SearchRecord, tested: Tested | None) -> str:
    """Whether pruning paid, of files that were chosen on other windows than those that it is told from."""
    one, other = (found.find(file) for file in (tested.first, tested.second)) if tested else (None, None)
    if tested is None or one is None or other is None:
        return "Nothing was compared."
    by = tested.found
    share = f"{100 * ((by.value or 1) - 1):+.1f} %"
    if by.low is not None and by.high is not None:
        share += f" ({100 * (by.low - 1):+.1f} to {100 * (by.high - 1):+.1f} %)"
    return f"{_PAID[by.verdict]}: {_named(other)} has {share} bits per byte against {_named(one)}."


_SIZE = Axis("file size, MB", lambda one: one.file_bytes / 1e6)
_SPEED = Axis("decode, tokens per second", lambda one: one.decode[0] if one.decode else None)
_MEMORY = Axis("memory, MiB", lambda one: one.memory_bytes / 2**20 if one.memory_bytes else None)
_KL = Axis("KL from the dense model, nats a token", lambda one: None if one.point.vocabulary else one.kl_mean)
_PLOTS = (
    ("plot-size", "Size against loss", _SIZE, BITS),
    ("plot-speed", "Decode speed against loss", _SPEED, BITS),
    ("plot-memory", "Memory against loss", _MEMORY, BITS),
    ("plot-kl", "Size against divergence, of files that have all tokens", _SIZE, _KL),
)
_CUT = Axis("FFN channels removed, %", lambda one: 100 * one.removed)
_SWEEP = (
    ("plot-cut-loss", "Loss against what is removed", _CUT, BITS),
    ("plot-cut-size", "Size against what is removed", _CUT, _SIZE),
    ("plot-cut-speed", "Decode speed against what is removed", _CUT, _SPEED),
)
"""Of a search over at least three ratios."""


def render_search(found: SearchRecord) -> str:
    """search.html: opens without a network."""
    files = sorted(found.points, key=lambda one: not one.is_dense)
    beaten = {one.file for one in found.standings if one.verdict == DOMINATED}
    table = search_table(found)

    def lines(one: EvaluatedPoint) -> list[str]:
        return [megabytes(one.file_bytes), f"KL {one.kl_mean:.4f}"]

    plots, titles = dict[str, Any](), dict[str, str]()
    swept = len({one.point.ratio for one in files}) > 2
    for id, title, x, y in (*_PLOTS, *(_SWEEP if swept else ())):
        series = dict[str, list[EvaluatedPoint]]()
        for one in files:
            of = replace(one.point, ratio=0.0).label.removeprefix("dense ") if x is _CUT else one.point.model
            series.setdefault(of, []).append(one)
        if any(None not in (x.of(one), y.of(one)) for one in files):
            named = None if x is _CUT else (lambda one: one.point.quant)
            plots[id] = loss_figure(series, x, y, beaten=beaten, name=named, lines=lines)
            titles[id] = title
    context = {
        "source": found.source,
        "lines": [line.removeprefix("- ") for line in sentences(found)],
        "conditions": conditions(found),
        "titles": [column.title for column in table.columns],
        "rows": [["-" if cell is None else cell for cell in row] for row in table.cells()],
        "shown": titles,
    }
    return render_page("search.html.j2", context, plots, plotly_script(needed=True), DARK)
