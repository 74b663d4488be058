"""history.jsonl: a line a release, and figures that left what was usual in the releases before.

A figure is compared with the median m of up to WINDOW earlier runs that measured it in the same way. It has changed if

    |x - m| > max(threshold |m|, 4 s),    s = max(1.4826 MAD, standard error of x)

MAD being the median absolute deviation of those runs (Leys et al. 2013). Figures without noise change by the threshold.
One with windows of text or items of tasks is compared on them with that of the run in the middle of those: it has
changed if `judge_pairs` says better or worse by more than `eval --baseline` tolerates.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import ClassVar

from cfsp.errors import InputError, LimitError
from cfsp.evaluation.task_results import Right
from cfsp.files import write_text
from cfsp.reading import read_json_lines
from cfsp.records import record_from_json, record_to_json
from phoneready.figures.figures import DENSE, FigureKey, FigureSet, format_figure, recorded_metric
from runtime_bench.presentation.table import escape_markdown, table_of_cells
from runtime_bench.records.compare import BETTER, WORSE, Samples, judge, judge_pairs
from runtime_bench.records.pairs import Windows
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
_Row = tuple[int, "HistoryFigure"]
"""The number of a run, from 1, and a figure of it."""


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
    right: tuple[Right, ...] = ()
    windows: Windows | None = None

    @property
    def pairs(self) -> Windows | tuple[Right, ...] | None:
        """Windows or items, if it is compared by them."""
        return (self.windows or self.right or None) if recorded_metric(self.key.metric).tolerance else None


@dataclass(frozen=True)
class HistoryEntry:
    """A run: what was made, measured and decided. `id` hashes that: a run that found everything done has it again."""

    KIND: ClassVar[str] = "history-entry"
    SCHEMA_VERSION: ClassVar[int] = 3

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
        return self.label or self.id[:8]


@dataclass(frozen=True)
class Anomaly:
    """A figure that left what was usual (the median `before`), and the run that began it, by number and name.

    `noise` is the relative spread that it was compared with, `changed` what that run did otherwise than the one before;
    if the dense model's figure changed with it, it was the machine or the runtime.
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
    over: bool = False  # the newest run is as before again

    @property
    def change(self) -> str:
        share = f", {100 * (self.after / self.before - 1):+.1f} %" if self.before else ""
        return f"{format_figure(self.before, self.unit)} to {format_figure(self.after, self.unit)}{share}"

    def describe(self) -> str:
        word = {True: "worse", False: "better", None: "changed"}[self.worse]
        whose = " of the dense model" if self.role == DENSE else ""
        noise = f" (noise {self.noise:.1%})" if self.noise else ""
        text = f"{word}: {self.series}{whose} since {self.name} (run {self.run}): {self.change}{noise}"
        if self.dense_too:
            text += "; the dense model's figure changed with it, so look at the machine and the runtime"
        text += "; the newest run is as before again" if self.over else ""
        return text + (f"; that run: {'; '.join(self.changed)}" if self.changed else "")


@dataclass(frozen=True)
class History:
    """Runs in order of time, and anomalies in order of the runs that began them."""

    KIND: ClassVar[str] = "history"
    SCHEMA_VERSION: ClassVar[int] = 4

    source: str
    threshold: float
    runs: tuple[HistoryEntry, ...]
    anomalies: tuple[Anomaly, ...]

    def series(self) -> list[list[_Row]]:
        """Each figure over the runs that measured it in the same way."""
        rows: dict[tuple[object, ...], list[_Row]] = {}
        for number, entry in enumerate(self.runs, 1):
            for one in entry.figures:
                key = (one.role, one.key, tuple(sorted(one.conditions.items())))
                rows.setdefault(key, []).append((number, one))
        return list(rows.values())

    def changed(self, number: int) -> tuple[str, ...]:
        """Stages, settings and packages of a run that differ from the run before."""
        if number < 2:
            return ()
        before, now = self.runs[number - 2 : number]
        words = [
            f"{name} {old.get(name)} -> {value}"
            for old, new in ((before.settings, now.settings), (before.versions, now.versions))
            for name, value in new.items()
            if old.get(name) != value
        ]
        stages = [name for name, key in now.stages.items() if before.stages.get(name) != key]
        return (*words, *([f"stages done again: {', '.join(stages)}"] if stages else []))


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
    """The line of a run, without figures of a machine that was too busy: they would look like a change of the model."""
    kept = []
    for figure in figures.figures:
        if figure.value is None or any(one and one.noise for one in (figure.samples, figure.anchor)):
            continue
        unit, value, error = figure.unit, figure.value, None
        if figure.samples:
            # Whether more samples were taken says nothing of how far a median may be off.
            sides = (figure.anchor or Samples("", (1.0,)), figure.samples)
            base, timed = (replace(side, looks=1) for side in sides)
            found = judge(base, timed).interval
            if found and timed.n_independent >= _FEWEST:
                # The standard error that the median's bootstrap interval stands for.
                error = math.log(found.high / found.low) / (2 * NORMAL_95)
            if found and figure.anchor:
                unit, value = ANCHORED, figure.in_unit(found).ratio
        elif figure.stderr is not None and value > 0:
            error = figure.stderr / value
        kept.append(
            HistoryFigure(
                figure.key, figure.role, unit, value, error, figure.conditions, figure.higher_is_better,
                figure.right, figure.windows,
            )
        )  # fmt: skip
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
        figures=tuple(kept),
    )


def append_entry(folder: Path, entry: HistoryEntry) -> bool:
    """Add a run to the folder's history, atomically; False if the last run was the same. Raises as `read_entries`."""
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
    """The runs, each once, by time, of history files, of folders that have one, and of the folders inside those.

    Raises InputError if there is nothing, a file cannot be read, or runs are of different models.
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
    """Put the last runs side by side and look for changes by this module's rule; raises InputError without any."""
    if not entries:
        raise InputError("there are no runs")
    history = History(entries[-1].source, threshold, tuple(entries[-last:]), ())
    found: list[Anomaly] = []
    for rows in history.series():
        key, newest = rows[0][1].key, rows[-1][1]
        metric, figures = recorded_metric(key.metric), [figure for _, figure in rows]
        better = newest.higher_is_better if metric.higher_is_better is None else metric.higher_is_better
        sampled = metric.sampled or any(figure.error is not None for figure in figures)
        going = 0.0  # of neighbouring runs that changed in one direction, the first is named
        for place, (number, figure) in enumerate(rows):
            earlier = figures[max(0, place - WINDOW) : place]
            found_now = _change(figure, earlier, threshold, sampled=sampled)
            if found_now is None:
                going = 0.0
                continue
            usual, change, noise = found_now
            if change * going <= 0:
                anomaly = Anomaly(
                    series=key.describe(),
                    role=figure.role,
                    run=number,
                    name=history.runs[number - 1].name,
                    before=usual,
                    after=figure.value,
                    unit=figures[0].unit,
                    noise=noise,
                    worse=None if better is None else (change < 0) == better,
                    changed=history.changed(number),
                    over=(last_change := _change(newest, earlier, threshold, sampled=sampled)) is None
                    or last_change[1] * change < 0,
                )
                found.append(anomaly)
            going = change
    dense = {(a.series, a.run) for a in found if a.role == DENSE}
    marked = [replace(a, dense_too=a.role != DENSE and (a.series, a.run) in dense) for a in found]
    return replace(history, anomalies=tuple(sorted(marked, key=lambda a: (a.run, a.role == DENSE, a.series))))


def _change(
    figure: HistoryFigure, earlier: Sequence[HistoryFigure], threshold: float, *, sampled: bool
) -> tuple[float, float, float] | None:
    """What was usual, by how much a figure left that, and the relative noise; None if it did not."""
    if not earlier:
        return None
    usual, metric = median(one.value for one in earlier), recorded_metric(figure.key.metric)
    alike = [one for one in earlier if one.pairs and figure.pairs]
    if alike and figure.pairs:
        middle = sorted(alike, key=lambda one: one.value)[(len(alike) - 1) // 2]
        assert middle.pairs is not None
        found = judge_pairs(
            middle.pairs,
            figure.pairs,
            higher_is_better=bool(metric.higher_is_better),
            difference=not metric.tolerates_ratio,
            threshold=metric.margin,
        )
        changed = found.verdict in (BETTER, WORSE) and found.low is not None and found.high is not None
        if not changed or found.low is None or found.high is None:
            return None
        half = (found.high - found.low) / 2
        noise = half if metric.tolerates_ratio else half / usual if usual else 0.0
        return middle.value, figure.value - middle.value, noise
    value, change = figure.value, figure.value - usual
    known = figure.error is not None or len(earlier) >= _FEWEST_RUNS
    scatter = _MAD_TO_SIGMA * median(abs(one.value - usual) for one in earlier)
    spread = max(scatter, (figure.error or 0.0) * abs(value)) if sampled else 0.0
    if (sampled and not known) or abs(change) <= max(threshold * abs(usual), _SPREADS * spread):
        return None
    return usual, change, spread / abs(usual) if usual else 0.0


def check_history(history: History, recent: int) -> None:
    """Raise LimitError if a figure of what ships got worse in one of the `recent` newest runs, and still is."""
    newest = [
        a
        for a in history.anomalies
        if a.worse and not a.over and a.role != DENSE and a.run > len(history.runs) - recent
    ]
    if newest:
        told = "; ".join(f"{a.series} since {a.name} (run {a.run}): {a.change}" for a in newest)
        raise LimitError(f"{len(newest)} changes for the worse in the last {recent} runs: {told}")


def format_history(history: History, *, every: bool = False) -> str:
    """Markdown: runs, figures of the newest of them (the dense model's too with `every`), and what changed."""
    numbered = list(enumerate(history.runs, 1))
    runs = [[str(n), r.name, r.time, r.outcome, "; ".join(history.changed(n)) or "-"] for n, r in numbered]
    shown, rows = numbered[-_SHOWN:], []
    for series in history.series():
        name, first, known = series[0][1].key.describe(), series[0][1], dict(series)
        if first.role == DENSE and not every:
            continue
        cells = []
        for number, _ in shown:
            one = known.get(number)
            cell = format_figure(one.value if one else None, first.unit)
            cells.append(cell + (f" ± {100 * one.error:.1f} %" if one and one.error else ""))
        since = [a.name for a in history.anomalies if (a.series, a.role) == (name, first.role)]
        rows.append([f"{name} (dense)" if first.role == DENSE else name, *cells, ", ".join(since) or "-"])
    told = [f"- {escape_markdown(anomaly.describe())}" for anomaly in history.anomalies]
    said = f"Changes of more than {history.threshold:.0%} and more than the noise:"
    header = ["run", "name", "time (UTC)", "budgets", "changed since the run before"]
    parts = [
        f"{escape_markdown(history.source)}: {len(runs)} runs",
        table_of_cells(header, runs).markdown(),
        table_of_cells(["figure", *(run.name for _, run in shown), "changed"], rows).markdown(),
        said if told else "No change beyond the noise.",
        "\n".join(told),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"
