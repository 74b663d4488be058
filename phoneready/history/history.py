"""Runs put side by side: series of every figure, and where they changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from cfsp.errors import InputError, LimitError
from cfsp.settings import check_settings
from phoneready.figures.figure_set import DENSE
from phoneready.figures.metrics import recorded_metric
from phoneready.figures.verdict import format_figure
from phoneready.history.changes import Change, exact_changes, sampled_changes
from phoneready.history.entry import HISTORY_FILE, HistoryEntry, HistoryFigure, read_entries
from phoneready.history.settings import DEFAULTS, HistorySettings

_WORDS = {True: "worse", False: "better", None: "changed"}


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        number: In order of time, from 1.
        name: Its label, or the beginning of its id.
        time: UTC, RFC 3339.
        outcome: The budgets' verdict.
        settings: What was made.
        changed: Stages, and packages with their versions, that differ from the run before.
    """

    number: int
    name: str
    time: str
    outcome: str
    settings: dict[str, str]
    changed: tuple[str, ...]


@dataclass(frozen=True)
class Series:
    """A figure over runs, measured in the same way.

    Attributes:
        name: For people.
        metric: A name in METRICS, with its number of tokens.
        role: `pruned`, or `dense`.
        unit: Of the values.
        higher_is_better: Direction; None of an own metric that states none.
        sampled: Whether the figure has noise.
        conditions: How it was measured.
        runs: Numbers of the runs that have it.
        values: Of each.
        errors: Relative standard error of each; None where it has none.
    """

    name: str
    metric: str
    role: str
    unit: str
    higher_is_better: bool | None
    sampled: bool
    conditions: dict[str, str]
    runs: tuple[int, ...]
    values: tuple[float, ...]
    errors: tuple[float | None, ...]


@dataclass(frozen=True)
class Anomaly:
    """A change of a series that its noise does not explain.

    Attributes:
        series: Its name.
        role: `pruned`, or `dense`.
        kind: `step`, or `drift`.
        run: Number of the run that began it.
        name: That run's name.
        before: Figure before.
        after: Figure after.
        unit: Of both.
        ratio: after / before; None where before is 0.
        noise: Relative scatter of single runs; 0 of exact figures.
        worse: Whether the change is for the worse; None where nobody says which way is.
        changed: What that run did otherwise than the one before.
        dense_too: Whether the dense model's figure changed with it: then it was the machine or the runtime.
    """

    series: str
    role: str
    kind: str
    run: int
    name: str
    before: float
    after: float
    unit: str
    ratio: float | None
    noise: float
    worse: bool | None
    changed: tuple[str, ...]
    dense_too: bool

    @property
    def change(self) -> str:
        """Before and after, for people."""
        before, after = (format_figure(value, self.unit) for value in (self.before, self.after))
        share = "" if self.ratio is None else f", {100 * (self.ratio - 1):+.1f} %"
        return f"{before} to {after}{share}"

    def describe(self) -> str:
        """A sentence for people."""
        noise = f" (single runs scatter by {self.noise:.1%})" if self.noise else ""
        whose = " of the dense model" if self.role == DENSE else ""
        text = (
            f"{_WORDS[self.worse]}: {self.series}{whose}, {self.kind} since {self.name} (run {self.run}): "
            f"{self.change}{noise}"
        )
        if self.dense_too:
            text += "; the dense model's figure changed with it, so look at the machine and the runtime"
        return text + (f"; that run: {'; '.join(self.changed)}" if self.changed else "")


@dataclass(frozen=True)
class History:
    """Runs, series and anomalies.

    Attributes:
        source: Reference of the dense model.
        threshold: Relative change that counts.
        false_alarms: Chance that a history without changes shows any.
        runs: In order of time.
        series: Of all figures.
        anomalies: In order of the runs that began them.
    """

    KIND: ClassVar[str] = "history"
    SCHEMA_VERSION: ClassVar[int] = 1

    source: str
    threshold: float
    false_alarms: float
    runs: tuple[Run, ...]
    series: tuple[Series, ...]
    anomalies: tuple[Anomaly, ...]


def find_entries(paths: Sequence[Path]) -> list[HistoryEntry]:
    """The runs of history files, of folders that have one, and of the folders inside those; each once, by time.

    Raises:
        InputError: Nothing there, a file that cannot be read, or runs of different models.
    """
    files: list[Path] = []
    for path in paths:
        inside = [path] if path.is_file() else [path / HISTORY_FILE, *sorted(path.glob(f"*/{HISTORY_FILE}"))]
        present = [file for file in inside if file.is_file()]
        if not present:
            raise InputError(
                f"{path} has no {HISTORY_FILE}", allowed="release folders, folders of those, or such files"
            )
        files += present
    entries = {(e.time, e.id): e for file in dict.fromkeys(files) for e in read_entries(file)}
    runs = [entries[key] for key in sorted(entries)]
    models = {e.source_sha256 or e.source: e.source for e in runs}
    if len(models) > 1:
        raise InputError(
            f"runs of different models: {', '.join(sorted(models.values()))}", allowed="one model at a time"
        )
    return runs


def make_history(entries: Sequence[HistoryEntry], settings: HistorySettings = DEFAULTS) -> History:
    """Put runs side by side and look for changes.

    Args:
        entries: By time.
        settings: What counts; the chance of a false alarm is that of the whole history, of whatever many series.

    Raises:
        InputError: No runs, or a setting out of range.
    """
    check_settings(settings)
    if not entries:
        raise InputError("there are no runs")
    entries = entries[-settings.last :]
    runs = _runs(entries)
    series = _series(entries)
    tested = sum(one.sampled for one in series)
    anomalies = [
        _anomaly(one, change, runs)
        for one in series
        for change in _changes(one, settings.threshold, settings.false_alarms / max(tested, 1))
    ]
    dense = {(a.series, a.run) for a in anomalies if a.role == DENSE}
    marked = [replace(a, dense_too=a.role != DENSE and (a.series, a.run) in dense) for a in anomalies]
    return History(
        source=entries[-1].source,
        threshold=settings.threshold,
        false_alarms=settings.false_alarms,
        runs=runs,
        series=series,
        anomalies=tuple(sorted(marked, key=lambda a: (a.run, a.role == DENSE, a.series))),
    )


def check_history(history: History, recent: int) -> None:
    """Turn anomalies for the worse into an exit status.

    Args:
        history: With its anomalies.
        recent: Runs, the newest, in which one must have begun to count.

    Raises:
        LimitError: There is such a one, of the pruned model; the message has them all.
    """
    newest = history.runs[-1].number
    bad = [a for a in history.anomalies if a.worse and a.role != DENSE and a.run > newest - recent]
    if bad:
        told = "; ".join(f"{a.kind} of {a.series} since {a.name} (run {a.run}): {a.change}" for a in bad)
        raise LimitError(f"{len(bad)} changes for the worse in the last {recent} runs: {told}")


def _runs(entries: Sequence[HistoryEntry]) -> tuple[Run, ...]:
    befores: list[HistoryEntry | None] = [None, *entries[:-1]]
    return tuple(
        Run(number, e.name, e.time, e.outcome, e.settings, tuple(_differences(before, e)))
        for number, (before, e) in enumerate(zip(befores, entries, strict=True), 1)
    )


def _differences(before: HistoryEntry | None, now: HistoryEntry) -> Iterable[str]:
    if before is None:
        return
    for old, new in ((before.settings, now.settings), (before.versions, now.versions)):
        for name, value in new.items():
            if old.get(name) != value:
                yield f"{name} {old.get(name)} -> {value}"
    stages = [name for name, key in now.stages.items() if before.stages.get(name) != key]
    if stages:
        yield f"stages done again: {', '.join(stages)}"


def _series(entries: Sequence[HistoryEntry]) -> tuple[Series, ...]:
    rows_by_figure: dict[tuple[object, ...], list[tuple[int, HistoryFigure]]] = {}
    for number, entry in enumerate(entries, 1):
        for figure in entry.figures:
            conditions = tuple(sorted(figure.conditions.items()))
            rows_by_figure.setdefault((figure.role, figure.key, conditions), []).append((number, figure))
    return tuple(_one_series(rows) for rows in rows_by_figure.values())


def _one_series(rows: Sequence[tuple[int, HistoryFigure]]) -> Series:
    first, metric = rows[0][1], recorded_metric(rows[0][1].key.metric)
    own = rows[-1][1].higher_is_better
    return Series(
        name=first.key.describe(),
        metric=first.key.metric,
        role=first.role,
        unit=first.unit,
        higher_is_better=own if metric.higher_is_better is None else metric.higher_is_better,
        sampled=metric.sampled or any(figure.error is not None for _, figure in rows),
        conditions=first.conditions,
        runs=tuple(number for number, _ in rows),
        values=tuple(figure.value for _, figure in rows),
        errors=tuple(figure.error for _, figure in rows),
    )


def _changes(series: Series, threshold: float, false_alarms: float) -> tuple[Change, ...]:
    if series.sampled and min(series.values) > 0:
        return sampled_changes(series.values, series.errors, threshold=threshold, false_alarms=false_alarms)
    return exact_changes(series.values, threshold)


def _anomaly(series: Series, change: Change, runs: Sequence[Run]) -> Anomaly:
    run, higher = runs[series.runs[change.first] - 1], series.higher_is_better
    return Anomaly(
        series=series.name,
        role=series.role,
        kind=change.kind,
        run=run.number,
        name=run.name,
        before=change.before,
        after=change.after,
        unit=series.unit,
        ratio=change.after / change.before if change.before else None,
        noise=change.noise,
        worse=None if higher is None else (change.after < change.before) == higher,
        changed=run.changed,
        dense_too=False,
    )
