"""search.json, and what it says: the table, the best file, and whether pruning pays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cfsp.errors import InputError
from cfsp.recovery.settings import settled, token_budget
from cfsp.units import format_bytes, megabytes
from cfsp.validation import Seed, Share
from phoneready.evaluation.measured_file import DOMINATED, Choice, Excess, MeasuredFile, Standing
from phoneready.evaluation.tables import WHAT_STANDINGS_MEAN, loss_columns, measured_on, standing_column
from phoneready.figures.budgets import INCONCLUSIVE, MISSED, PASS
from phoneready.search.point import Held, Point
from phoneready.settings.schema import RecoverConfig
from runtime_bench.presentation.markup import escape_markdown
from runtime_bench.presentation.table import Column, Table


@dataclass(frozen=True)
class Speed:
    """How fast a file decodes, and in what memory: measured at a place or projected to a device.

    Attributes:
        place: Target of the benchmark, or the device's profile.
        low: Slowest tenth of the samples, or the careful end of the projection.
        high: Fastest tenth, or the hopeful end.
        peak_bytes: Most memory; None where unknown.
        fits: Whether a device holds it; None of a measurement, or where its memory is unknown.
        n_threads: Threads of a measurement.
        failure: Why there is no figure.
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
    """A file and its figures; it may have been deleted.

    Attributes:
        point: What was made.
        sha256: Of the file.
        removed: Share of FFN channels that went, after alignment.
        expected_bytes: Its size as it was computed before it was made, where that can be.
        speed: How fast it is, if that was asked for.
        seconds: Time it took to make and measure.
        shortcoming: Of its training; None where that gained something, or was not.
    """

    KIND: ClassVar[str] = "search-point"
    SCHEMA_VERSION: ClassVar[int] = 1

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
        """Whether nothing was removed."""
        return self.point.is_dense

    @property
    def label(self) -> str:
        """The file, for people."""
        return self.point.label

    @property
    def bits_ratio(self) -> float:
        """Bits per byte, times the dense model's in float32."""
        return self.bits_per_byte / self.dense_bits_per_byte


@dataclass(frozen=True)
class SearchRecord:
    """search.json.

    Attributes:
        source: Reference of the dense model.
        source_sha256: Hash of its weights, where known.
        seed: Of everything drawn.
        calibration: References of the calibration text, whose tokens were counted, too.
        strategy: How points were chosen.
        limits: In words.
        points: All files that were measured, by size.
        held: Of each, how it stands to the limits.
        standings: Of each, how it stands to those that are no larger.
        choices: The best file at each size that tells something.
        best: The file to take; None where none is within all limits.
        best_dense: The dense model's best file within them.
        excess: What `best_dense` loses more than `best`; None where they are one file or there is none.
        left_out: Files that were not made, and why.
        failed: Files that could not be made, and why.
        open: Files that are still to be measured.
        kept: Files that lie in the folder.
        recovery: How models were trained, where any were.
    """

    KIND: ClassVar[str] = "search"
    SCHEMA_VERSION: ClassVar[int] = 1

    source: str
    source_sha256: str | None
    seed: Seed
    calibration: tuple[str, ...]
    strategy: str
    limits: tuple[str, ...]
    points: tuple[EvaluatedPoint, ...]
    held: tuple[tuple[Held, ...], ...]
    standings: tuple[Standing, ...]
    choices: tuple[Choice, ...]
    best: str | None
    best_dense: str | None
    excess: Excess | None
    left_out: tuple[str, ...]
    failed: tuple[str, ...]
    open: tuple[str, ...]
    kept: tuple[str, ...]
    recovery: RecoverConfig | None = None

    def find(self, file: str | None) -> EvaluatedPoint | None:
        """The file of a name."""
        return next((point for point in self.points if point.file == file), None)

    @property
    def outcome(self) -> str:
        """Whether a file is within all limits: `pass`; `inconclusive` where one may be; `missed`."""
        each = [outcome_of(held) for held in self.held]
        return next((one for one in (PASS, INCONCLUSIVE) if one in each), MISSED)


def outcome_of(held: tuple[Held, ...]) -> str:
    """The worst of a file."""
    each = [one.outcome for one in held]
    return next((one for one in (MISSED, INCONCLUSIVE) if one in each), PASS)


def format_search(found: SearchRecord) -> str:
    """search.md."""
    parts = [f"{line}\n" for line in sentences(found)]
    parts += [search_table(found).markdown(), escape_markdown(conditions(found))]
    for title, rows in (
        ("Outside the limits by what is known before, and not made", found.left_out),
        ("Could not be made", found.failed),
        ("Not measured yet", found.open),
    ):
        parts += ["", f"{title}:", "", *(f"- {escape_markdown(row)}" for row in rows)] if rows else []
    if found.kept:
        parts += ["", f"Kept: {', '.join(found.kept)}."]
    return "\n".join(parts) + "\n"


def search_table(found: SearchRecord) -> Table[EvaluatedPoint]:
    """One row a file, the smallest first."""

    def decode(one: EvaluatedPoint) -> str | None:
        if one.speed is None or one.speed.low is None or one.speed.high is None:
            return "failed" if one.speed and one.speed.failure else None
        return f"{one.speed.low:.1f} to {one.speed.high:.1f} t/s"

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
    held = {one.file: rows for one, rows in zip(found.points, found.held, strict=True)}
    if found.limits:
        columns.append(Column("limits", lambda one: _standing_to_limits(held[one.file])))
    return Table(
        [*columns, standing_column(found.points, {s.file: s for s in found.standings})], found.points
    )


def _standing_to_limits(held: tuple[Held, ...]) -> str:
    wrong = [f"{one.outcome}: {one.limit} ({one.figure})" for one in held if one.outcome != PASS]
    return "; ".join(wrong) or "within"


def conditions(found: SearchRecord) -> str:
    """What was measured on, and what the words mean."""
    if not found.points:
        return "Nothing was measured."
    speeds = {one.speed for one in found.points if one.speed}
    places = dict.fromkeys(
        f" Decode and memory are {'measured at' if one.n_threads else 'projected to'} {one.place}."
        for one in speeds
    )
    trained = ""
    if found.recovery is not None and any(one.point.recovered for one in found.points):
        how = settled(found.recovery)
        most = f"{how.epochs:g} passes over" if how.epochs else f"{token_budget(how)} tokens of"
        trained = f" Recovered: {how.method}, {how.loss}, {most} {', '.join(how.data)}."
    return f"{measured_on(found.points)}{''.join(places)}{trained} {WHAT_STANDINGS_MEAN}"


def sentences(found: SearchRecord) -> Iterator[str]:
    """The best file, what the dense model would lose more, and whether pruning pays."""
    limits = ", ".join(found.limits)
    best, dense = found.find(found.best), found.find(found.best_dense)
    if found.limits and best is None:
        nearest = _nearest(found)
        yield f"No file is within {limits}" + (f"; nearest is {_named(nearest)}." if nearest else ".")
    elif found.limits and best is not None:
        yield f"The best file within {limits} is {_named(best)}. {_paid(found, best, dense)}"
    for choice in () if found.limits else found.choices:
        one, other = found.find(choice.best), found.find(choice.dense)
        if one is not None:
            rest = (
                "nothing pruned is better there."
                if one is other
                else f"quantizing the dense model to that, {_named(other)}, loses {_lost(choice.excess)} more."
                if other is not None and choice.excess is not None
                else "no quantization of the dense model gets there."
            )
            yield f"- At {megabytes(choice.at_bytes)} the best file is {_named(one)}: {rest}"
    if pays := _whether_it_pays(found):
        yield pays


def _paid(found: SearchRecord, best: EvaluatedPoint, dense: EvaluatedPoint | None) -> str:
    if best.is_dense:
        tried = any(not one.is_dense for one in found.points)
        return "Pruning did not pay: no pruned file is better." if tried else "Nothing was pruned."
    if dense is None:
        return "Pruning paid: no quantization of the dense model is within the limits."
    if found.excess is None or found.excess.low is None or found.excess.low <= 0:
        saved = dense.file_bytes - best.file_bytes
        size = f" and is {megabytes(saved)} larger" if saved > 0 else ""
        lost = f" loses {_lost(found.excess)} more" if found.excess else ""
        return (
            f"The best dense one, {_named(dense)},{lost}{size}; the difference in loss is within the noise."
        )
    return f"Pruning paid: the best dense one, {_named(dense)}, loses {_lost(found.excess)} more."


def _whether_it_pays(found: SearchRecord) -> str:
    """What quantizing the dense model alone makes of the pruned files; empty without any."""
    pruned = {one.file for one in found.points if not one.is_dense}
    beaten = [
        one
        for one in found.standings
        if one.file in pruned
        and one.verdict == DOMINATED
        and (rival := found.find(one.by)) is not None
        and rival.is_dense
    ]
    if pruned and len(beaten) == len(pruned):
        return (
            "Pruning does not pay here: every pruned file is dominated by a dense quantization, "
            "which is no larger and loses no more. Quantize the dense model instead."
        )
    return (
        f"{len(beaten)} of {len(pruned)} pruned files are dominated by a dense quantization."
        if pruned
        else ""
    )


def _nearest(found: SearchRecord) -> EvaluatedPoint | None:
    """The file that misses its limits by least."""
    worst = {
        one.file: max((h.over for h in held), default=0.0)
        for one, held in zip(found.points, found.held, strict=True)
    }
    return min(found.points, key=lambda one: worst[one.file], default=None)


def _named(one: EvaluatedPoint) -> str:
    return (
        f"{one.label} ({megabytes(one.file_bytes)}, {one.bits_per_byte:.4f} bits a byte, "
        f"{one.bits_ratio - 1:+.1%})"
    )


def _lost(excess: Excess | None) -> str:
    assert excess is not None  # of two files
    if excess.low is None or excess.high is None:
        return f"{excess.bits:.4f} bits a byte"
    return f"{excess.bits:.4f} ({excess.low:.4f} to {excess.high:.4f}) bits a byte"
