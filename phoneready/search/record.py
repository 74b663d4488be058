"""search.json, and what search.md and search.html show of it: the verdict in sentences, the table, plots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from cfsp.errors import InputError
from cfsp.recovery.settings import settled
from cfsp.units import format_bytes, megabytes
from cfsp.validation import Seed, Share
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
from phoneready.figures.figures import INCONCLUSIVE, MISSED, PASS
from phoneready.report.plots import BITS, DARK, Axis, loss_figure, plotly_script, render_page
from phoneready.search.point import Held, Point
from phoneready.settings.schema import RecoverConfig
from runtime_bench.presentation.table import Column, Table, escape_markdown
from runtime_bench.records.compare import BETTER, NO_DIFFERENCE, WORSE


@dataclass(frozen=True)
class Speed:
    """How fast a file decodes, tokens per second between the slowest and the fastest tenth, and in what memory.

    Measured at a place, or projected to a device: then `fits` says whether it holds the file, if that is known.
    """

    place: str
    low: float | None
    high: float | None
    peak_bytes: float | None
    fits: bool | None = None
    n_threads: int | None = None
    failure: str | None = None


@dataclass(frozen=True)
class EvaluatedPoint(MeasuredFile):
    """A file, which may have been deleted, and its figures; `removed` is the share of FFN channels, after alignment,
    `shortcoming` what is wrong with its training."""

    KIND: ClassVar[str] = "search-point"
    SCHEMA_VERSION: ClassVar[int] = 2

    point: Point
    sha256: str
    removed: Share
    expected_bytes: int | None
    speed: Speed | None
    seconds: float
    shortcoming: str | None = None

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


@dataclass(frozen=True)
class SearchRecord:
    """search.json: all files that were measured, by size; for each how it stands to the limits (`held`) and to files
    that are no larger; the best within all limits, and the dense model's best; what was not made or failed, and why."""

    KIND: ClassVar[str] = "search"
    SCHEMA_VERSION: ClassVar[int] = 3

    source: str
    source_sha256: str | None
    seed: Seed
    calibration: tuple[str, ...]
    strategy: str
    limits: tuple[str, ...]
    points: tuple[EvaluatedPoint, ...]
    held: tuple[tuple[Held, ...], ...]
    standings: tuple[Standing, ...]
    best: str | None
    best_dense: str | None
    left_out: tuple[str, ...]
    failed: tuple[str, ...]
    kept: tuple[str, ...]
    recovery: RecoverConfig | None = None

    def find(self, file: str | None) -> EvaluatedPoint | None:
        return next((point for point in self.points if point.file == file), None)

    @property
    def outcome(self) -> str:
        """Whether a file is within all limits: `pass`; `inconclusive` if one may be; `missed`."""
        each = [outcome_of(held) for held in self.held]
        return next((one for one in (PASS, INCONCLUSIVE) if one in each), MISSED)


def outcome_of(held: tuple[Held, ...]) -> str:
    each = [one.outcome for one in held]
    return next((one for one in (MISSED, INCONCLUSIVE) if one in each), PASS)


def format_search(found: SearchRecord) -> str:
    parts = [f"{line}\n" for line in sentences(found)]
    parts += [search_table(found).markdown(), escape_markdown(conditions(found))]
    for title, rows in (("Not made, as they miss the limits", found.left_out), ("Failed", found.failed)):
        parts += ["", f"{title}:", "", *(f"- {escape_markdown(row)}" for row in rows)] if rows else []
    if found.kept:
        parts += ["", f"Kept: {', '.join(found.kept)}."]
    return "\n".join(parts) + "\n"


def search_table(found: SearchRecord) -> Table[EvaluatedPoint]:
    """One row a file, the smallest first."""
    held = {one.file: rows for one, rows in zip(found.points, found.held, strict=True)}

    def decode(one: EvaluatedPoint) -> str | None:
        if one.speed is None or one.speed.low is None or one.speed.high is None:
            return "failed" if one.speed and one.speed.failure else None
        return f"{one.speed.low:.1f} to {one.speed.high:.1f} t/s"

    def limits(one: EvaluatedPoint) -> str:
        wrong = [f"{h.outcome}: {h.limit} ({h.figure})" for h in held[one.file] if h.outcome != PASS]
        return "; ".join(wrong) or "within"

    columns: list[Column[Any]] = [
        Column("model", lambda one: one.point.model),
        Column("file", lambda one: one.point.quant),
        Column("size", lambda one: megabytes(one.file_bytes), right=True),
        *loss_columns(found.points),
    ]
    if any(point.speed for point in found.points):
        columns += [
            Column("decode", decode, right=True),
            Column("memory", lambda one: one.speed and format_bytes(one.speed.peak_bytes), right=True),
        ]
    columns += [Column("limits", limits)] if found.limits else []
    standings = {one.file: one for one in found.standings}
    return Table([*columns, standing_column(found.points, standings)], found.points)


def conditions(found: SearchRecord) -> str:
    if not found.points:
        return "Nothing was measured."
    places = dict.fromkeys(
        f" Decode and memory are {'measured at' if one.n_threads else 'projected to'} {one.place}."
        for one in (point.speed for point in found.points)
        if one
    )
    trained = ""
    if found.recovery is not None and any(one.point.recovered for one in found.points):
        how = settled(found.recovery)
        most = f"{how.max_tokens} tokens of"
        trained = f" Recovered: {how.method}, {how.loss}, {most} {', '.join(how.data)}."
    return f"{measured_on(found.points)}{''.join(places)}{trained} {WHAT_STANDINGS_MEAN}"


def sentences(found: SearchRecord) -> Iterator[str]:
    """The verdict: the best file, how much better it is than the best dense one, and whether pruning pays."""
    limits, best, dense = ", ".join(found.limits), found.find(found.best), found.find(found.best_dense)
    if found.limits and best is None:
        # The one that misses by least.
        over = [max((h.over for h in held), default=0.0) for held in found.held]
        nearest = min(zip(over, map(_named, found.points), strict=True), default=None)
        yield f"No file is within {limits}" + (f"; nearest is {nearest[1]}." if nearest else ".")
    elif found.limits and best is not None:
        yield f"The best file within {limits} is {_named(best)}."
        if best.is_dense:
            tried = any(not one.is_dense for one in found.points)
            yield "No pruned file within it loses less." if tried else "Nothing was pruned."
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
        f"{one.label} ({megabytes(one.file_bytes)}, {one.bits_per_byte:.4f} bits a byte, "
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
_SPEED = Axis("decode, tokens per second", lambda one: one.speed.low if one.speed else None)
_MEMORY = Axis(
    "memory, MiB", lambda one: one.speed.peak_bytes / 2**20 if one.speed and one.speed.peak_bytes else None
)
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
