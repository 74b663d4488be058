"""history.jsonl: one line a release, so that figures can be followed over versions whatever becomes of the rest."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from cfsp.files import write_text
from cfsp.reading import read_json_lines
from cfsp.records import record_from_json, record_to_json
from phoneready.figures.figure_set import Figure, FigureSet
from phoneready.figures.metrics import FigureKey
from runtime_bench.records.judgement import Samples, judge
from runtime_bench.records.summary import NORMAL_95

HISTORY_FILE = "history.jsonl"
ANCHORED = "x anchor"
"""Unit of speeds that are followed as multiples of the anchor's."""
_FEWEST = 3
"""Independent samples that say how far a median may be off."""


@dataclass(frozen=True)
class HistoryFigure:
    """A figure of a run.

    Attributes:
        key: Which one.
        role: `pruned`, or `dense`.
        unit: Of the value.
        value: The figure.
        error: Its relative standard error, from its own samples; None of figures without noise.
        conditions: What must be equal for two such figures to be comparable.
        higher_is_better: Direction, of own metrics that state it.
    """

    key: FigureKey
    role: str
    unit: str
    value: float
    error: float | None
    conditions: dict[str, str]
    higher_is_better: bool | None = None


@dataclass(frozen=True)
class HistoryEntry:
    """A run.

    Attributes:
        id: Hash of what was made, measured and decided: the same only for a run that found everything done.
        time: UTC time of its end, RFC 3339.
        label: What the user calls it, such as a version; None where nobody said.
        source: Reference of the dense model.
        source_sha256: Hash of its weights, where known.
        outcome: The budgets' verdict.
        settings: What was made, such as the prune ratio.
        versions: Package to version.
        stages: Name to key of each stage.
        figures: Everything that was measured.
    """

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
    """The line of a run that measured some figures; what else is given is as in HistoryEntry, and the time now.

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
            if f.value is not None and not (f.noise or f.anchor_noise)
        ),
    )


def _followed(figure: Figure, value: float) -> HistoryFigure:
    """What of a figure is followed; of one with an anchor, its multiple of the anchor's."""
    unit, error = figure.unit, None
    if figure.samples:
        timed = replace(figure.timed, looks=1)
        found = judge(figure.anchor or Samples("", (1.0,)), timed).interval
        if found and timed.n_independent >= _FEWEST:
            # Of a median the standard error that its bootstrap interval stands for.
            error = math.log(found.high / found.low) / (2 * NORMAL_95)
        if found and figure.anchor:
            unit, value = ANCHORED, figure.in_unit(found).ratio
    elif figure.stderr is not None and value > 0:
        error = figure.stderr / value
    return HistoryFigure(
        figure.key, figure.role, unit, value, error, figure.conditions, figure.higher_is_better
    )


def append_entry(folder: Path, entry: HistoryEntry) -> bool:
    """Add a run to the folder's history, atomically; False where the last run was the same.

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
    """The runs of a history file, in the order written.

    Raises:
        InputError: Unreadable, or a line that is no run of a known schema; the line is named.
    """
    return [record_from_json(HistoryEntry, row, where=where) for where, row in read_json_lines(path)]
