"""history.jsonl: a line a release, and figures that left what was usual in the releases before.

A figure is compared with the median m of up to WINDOW earlier runs that measured it in the same way. It has changed if

    |x - m| > max(threshold |m|, 4 s),    s = max(1.4826 MAD, standard error of x)

MAD being the median absolute deviation of those runs (Leys et al. 2013). Figures without noise change by the threshold.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import ClassVar

from cfsp.errors import InputError, LimitError
from cfsp.files import write_text
from cfsp.reading import read_json_lines
from cfsp.records import record_from_json, record_to_json
from phoneready.figures.figures import DENSE, Figure, FigureKey, FigureSet, format_figure, recorded_metric
from runtime_bench.presentation.markup import escape_markdown
from runtime_bench.presentation.table import table_of_cells
from runtime_bench.records.judgement import Samples, judge
from runtime_bench.records.summary import NORMAL_95

HISTORY_FILE = "history.jsonl"
ANCHORED = "x anchor"
"""Unit of speeds that are followed as multiples of the anchor's."""
WINDOW = 10
_FEWEST = 3
"""Independent samples that say how far a median may be off."""
_FEWEST_RUNS = 5
"""Earlier runs whose scatter says how large the noise of a measured figure is."""
_SPREADS = 4
_MAD_TO_SIGMA = 1.4826
_SHOWN = 6
"""Newest runs in the table of figures."""


@dataclass(frozen=True)
class HistoryFigure:
    """A figure of a run; `error` is its relative standard error from its own samples, None without noise."""

    key: FigureKey
    role: str
    unit: str
    value: float
    error: float | None
    conditions: dict[str, str]
    higher_is_better: bool | None = None


@dataclass(frozen=True)
class HistoryEntry:
    """A run: what was made, measured and decided. `id` is a hash of that: a run that found everything done has it
    again."""

    KIND: ClassVar[str] = "history-entry"
    SCHEMA_VERSION: ClassVar[int] = 1

    id: str
    time: str
    label: str | None
    source: str
    source_sha256: str | None
    outcome: str
    settings: dict[str, str]
    versions: dict[str, str]
    stages: dict[str, str]
    figures: tuple[HistoryFigure, ...]

    @property
    def name(self) -> str:
        """For people."""
        return self.label or self.id[:8]


@dataclass(frozen=True)
class Run:
    """A run by its number, from 1; `changed` has the stages, settings and packages that differ from the run before."""

    number: int
    name: str
    time: str
    outcome: str
    settings: dict[str, str]
    changed: tuple[str, ...]


@dataclass(frozen=True)
class Series:
    """A figure over runs, measured in the same way; `runs`, `values` and `errors` belong together."""

    name: str
    metric: str
    role: str
    unit: str
    higher_is_better: bool | None
    conditions: dict[str, str]
    runs: tuple[int, ...]
    values: tuple[float, ...]
    errors: tuple[float | None, ...]


@dataclass(frozen=True)
class Anomaly:
    """A figure that left what was usual before, and the run that began it.

    Attributes:
        before: Median of the runs before.
        noise: Relative spread that it was compared with; 0 of exact figures.
        worse: Whether the change is for the worse; None if nobody says which way is.
        changed: What that run did otherwise than the one before.
        dense_too: Whether the dense model's figure changed with it: then it was the machine or the runtime.
    """

    series: str
    role: str
    run: int
    name: str
    before: float
    after: float
    unit: str
    noise: float
    worse: bool | None
    changed: tuple[str, ...]
    dense_too: bool = False

    @property
    def change(self) -> str:
        """Before and after, for people."""
        share = f", {100 * (self.after / self.before - 1):+.1f} %" if self.before else ""
        return f"{format_figure(self.before, self.unit)} to {format_figure(self.after, self.unit)}{share}"

    def describe(self) -> str:
        """A sentence for people."""
        word = {True: "worse", False: "better", None: "changed"}[self.worse]
        whose = " of the dense model" if self.role == DENSE else ""
        noise = f" (noise {self.noise:.1%})" if self.noise else ""
        text = f"{word}: {self.series}{whose} since {self.name} (run {self.run}): {self.change}{noise}"
        if self.dense_too:
            text += "; the dense model's figure changed with it, so look at the machine and the runtime"
        return text + (f"; that run: {'; '.join(self.changed)}" if self.changed else "")


@dataclass(frozen=True)
class History:
    """Runs in order of time, series of all figures, and anomalies in order of the runs that began them."""

    KIND: ClassVar[str] = "history"
    SCHEMA_VERSION: ClassVar[int] = 2

    source: str
    threshold: float
    runs: tuple[Run, ...]
    series: tuple[Series, ...]
    anomalies: tuple[Anomaly, ...]


def entry_of(
    figures: FigureSet,
    *,
    outcome: str,
    settings: Mapping[str, str],
    versions: Mapping[str, str],
    stages: Mapping[str, str],
    label: str | None = None,
    time: datetime | None = None,
) -> HistoryEntry:
    """The line of a run; the time is now unless given.

    Figures of a machine that was too busy are left out: they would look like a change of the model.
    """
    known = json.dumps([dict(stages), label, outcome, record_to_json(figures)], sort_keys=True)
    return HistoryEntry(
        id=hashlib.sha256(known.encode()).hexdigest(),
        time=(time or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        label=label,
        source=figures.source,
        source_sha256=figures.source_sha256,
        outcome=outcome,
        settings=dict(settings),
        versions=dict(versions),
        stages=dict(stages),
        figures=tuple(
            _followed(f, f.value)
            for f in figures.figures
            if f.value is not None and not any(one and one.noise for one in (f.samples, f.anchor))
        ),
    )


def _followed(figure: Figure, value: float) -> HistoryFigure:
    """What of a figure is followed; of one with an anchor, its multiple of the anchor's."""
    unit, error = figure.unit, None
    if figure.samples:
        timed = replace(figure.samples, looks=1)
        found = judge(figure.anchor or Samples("", (1.0,)), timed).interval
        if found and timed.n_independent >= _FEWEST:
            # The standard error that the median's bootstrap interval stands for.
            error = math.log(found.high / found.low) / (2 * NORMAL_95)
        if found and figure.anchor:
            unit, value = ANCHORED, figure.in_unit(found).ratio
    elif figure.stderr is not None and value > 0:
        error = figure.stderr / value
    return HistoryFigure(
        figure.key, figure.role, unit, value, error, figure.conditions, figure.higher_is_better
    )


def append_entry(folder: Path, entry: HistoryEntry) -> bool:
    """Add a run to the folder's history, atomically; False if the last run was the same.

    Raises:
        InputError: The history that is there cannot be read.
    """
    path = folder / HISTORY_FILE
    before = read_entries(path) if path.is_file() else []
    if before and before[-1].id == entry.id:
        return False
    lines = [json.dumps(record_to_json(one), ensure_ascii=False, allow_nan=False) for one in (*before, entry)]
    write_text(path, "\n".join(lines) + "\n")
    return True


def read_entries(path: Path) -> list[HistoryEntry]:
    """The runs of a history file, in the order written; raises InputError, which names the line."""
    return [record_from_json(HistoryEntry, row, where=where) for where, row in read_json_lines(path)]


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


def make_history(entries: Sequence[HistoryEntry], *, threshold: float = 0.03, last: int = 100) -> History:
    """Put the last runs side by side and look for changes; raises InputError without any."""
    if not entries:
        raise InputError("there are no runs")
    entries = entries[-last:]
    befores: list[HistoryEntry | None] = [None, *entries[:-1]]
    runs = tuple(
        Run(number, e.name, e.time, e.outcome, e.settings, tuple(_differences(before, e)))
        for number, (before, e) in enumerate(zip(befores, entries, strict=True), 1)
    )
    rows_by_figure: dict[tuple[object, ...], list[tuple[int, HistoryFigure]]] = {}
    for number, entry in enumerate(entries, 1):
        for figure in entry.figures:
            conditions = tuple(sorted(figure.conditions.items()))
            rows_by_figure.setdefault((figure.role, figure.key, conditions), []).append((number, figure))
    series = []
    anomalies: list[Anomaly] = []
    for rows in rows_by_figure.values():
        first, metric = rows[0][1], recorded_metric(rows[0][1].key.metric)
        own = rows[-1][1].higher_is_better
        one = Series(
            name=first.key.describe(),
            metric=first.key.metric,
            role=first.role,
            unit=first.unit,
            higher_is_better=own if metric.higher_is_better is None else metric.higher_is_better,
            conditions=first.conditions,
            runs=tuple(number for number, _ in rows),
            values=tuple(figure.value for _, figure in rows),
            errors=tuple(figure.error for _, figure in rows),
        )
        series.append(one)
        sampled = metric.sampled or any(error is not None for error in one.errors)
        anomalies += _anomalies(one, runs, threshold, sampled=sampled)
    dense = {(a.series, a.run) for a in anomalies if a.role == DENSE}
    marked = [replace(a, dense_too=a.role != DENSE and (a.series, a.run) in dense) for a in anomalies]
    ordered = tuple(sorted(marked, key=lambda a: (a.run, a.role == DENSE, a.series)))
    return History(entries[-1].source, threshold, runs, tuple(series), ordered)


def _differences(before: HistoryEntry | None, now: HistoryEntry) -> Iterator[str]:
    if before is None:
        return
    for old, new in ((before.settings, now.settings), (before.versions, now.versions)):
        for name, value in new.items():
            if old.get(name) != value:
                yield f"{name} {old.get(name)} -> {value}"
    if stages := [name for name, key in now.stages.items() if before.stages.get(name) != key]:
        yield f"stages done again: {', '.join(stages)}"


def _anomalies(series: Series, runs: Sequence[Run], threshold: float, *, sampled: bool) -> Iterator[Anomaly]:
    """The rule of this module; of neighbouring runs that changed in one direction, the first."""
    going = 0.0
    for place, value in enumerate(series.values):
        earlier = series.values[max(0, place - WINDOW) : place]
        if not earlier:
            continue
        usual, error = median(earlier), series.errors[place]
        known = error is not None or len(earlier) >= _FEWEST_RUNS
        scatter = _MAD_TO_SIGMA * median(abs(one - usual) for one in earlier)
        spread = max(scatter, (error or 0.0) * abs(value)) if sampled else 0.0
        change = value - usual
        if (sampled and not known) or abs(change) <= max(threshold * abs(usual), _SPREADS * spread):
            going = 0.0
            continue
        if change * going <= 0:
            run, higher = runs[series.runs[place] - 1], series.higher_is_better
            yield Anomaly(
                series=series.name,
                role=series.role,
                run=run.number,
                name=run.name,
                before=usual,
                after=value,
                unit=series.unit,
                noise=spread / abs(usual) if usual else 0.0,
                worse=None if higher is None else (change < 0) == higher,
                changed=run.changed,
            )
        going = change


def check_history(history: History, recent: int) -> None:
    """Raise LimitError if a figure of the pruned model got worse in one of the `recent` newest runs; all are named."""
    newest = history.runs[-1].number
    bad = [a for a in history.anomalies if a.worse and a.role != DENSE and a.run > newest - recent]
    if bad:
        told = "; ".join(f"{a.series} since {a.name} (run {a.run}): {a.change}" for a in bad)
        raise LimitError(f"{len(bad)} changes for the worse in the last {recent} runs: {told}")


def format_history(history: History, *, every: bool = False) -> str:
    """Markdown: runs, figures of the newest of them (the dense model's too with `every`), and what changed."""
    runs = [[str(r.number), r.name, r.time, r.outcome, "; ".join(r.changed) or "-"] for r in history.runs]
    shown, rows = history.runs[-_SHOWN:], []
    for series in history.series:
        if series.role == DENSE and not every:
            continue
        known = dict(zip(series.runs, zip(series.values, series.errors, strict=True), strict=True))
        cells = []
        for run in shown:
            value, error = known.get(run.number, (None, None))
            cells.append(format_figure(value, series.unit) + (f" ± {100 * error:.1f} %" if error else ""))
        since = [a.name for a in history.anomalies if (a.series, a.role) == (series.name, series.role)]
        name = f"{series.name} (dense)" if series.role == DENSE else series.name
        rows.append([name, *cells, ", ".join(since) or "-"])
    told = [f"- {escape_markdown(anomaly.describe())}" for anomaly in history.anomalies]
    parts = [
        f"{escape_markdown(history.source)}: {len(runs)} runs",
        table_of_cells(
            ["run", "name", "time (UTC)", "budgets", "changed since the run before"], runs
        ).markdown(),
        table_of_cells(["figure", *(run.name for run in shown), "changed"], rows).markdown(),
        f"Changes of more than {history.threshold:.0%} and more than the noise:"
        if told
        else "No change beyond the noise.",
        "\n".join(told),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"
