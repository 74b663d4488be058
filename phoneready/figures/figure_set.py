"""figures.json: every figure that a release can be held to, with its samples, so that a later one can be compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from cfsp.errors import InputError
from cfsp.evaluation.task_results import Right
from cfsp.records import read_record
from cfsp.validation import Seed
from phoneready.figures.metrics import OWN_METRIC, FigureKey, means, recorded_metric
from runtime_bench.records.bench_record import MeasuredOn
from runtime_bench.records.judgement import Samples
from runtime_bench.records.summary import RatioInterval

FIGURES_FILE = "figures.json"
PRUNED, DENSE = "pruned", "dense"


@dataclass(frozen=True)
class Figure:
    """One figure of a release.

    Attributes:
        key: Which one; the same in other releases of the same configuration.
        role: PRUNED, or DENSE for what the pruned one is compared with.
        subject: The file or checkpoint, by name.
        value: None if it could not be found; `failure` says why.
        kind: How it came about: `exact`, or as in benchmark records, as are target and backends.
        samples: What it is the median of, in its unit, in the order taken; `rounds`: the process of each, from 0.
        paired: Figures of one name were sampled in turns: their samples may be compared pair by pair.
        stderr: Standard error, of accuracies.
        low: Lower end, `high` upper end: of bands, of the most of several, and by what a meter may be wrong.
        noise: Why its samples tell more of the machine than of the file.
        conditions: What must be equal for two such figures to be comparable.
        higher_is_better: Direction, of own metrics that state it.
        anchor_samples: Of the file that was measured in turns with it, so that other sessions can be compared with it.
        cpu_samples: The same by the processor's clock; empty if that clock does not tell of the file.
        right: For each task, which of its items were answered rightly, if that is recorded.
        measured_on: Whether samples were added until budgets were decided, as in benchmark records.
        cap: Share of its highest clock that the machine was held to, if known.
    """

    key: FigureKey
    role: str
    subject: str
    unit: str
    value: float | None
    kind: str = "exact"
    target: str | None = None
    samples: tuple[float, ...] = ()
    rounds: tuple[int, ...] = ()
    paired: str | None = None
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    failure: str | None = None
    noise: str | None = None
    conditions: dict[str, str] = field(default_factory=dict)
    higher_is_better: bool | None = None
    anchor_samples: tuple[float, ...] = ()
    anchor_rounds: tuple[int, ...] = ()
    cpu_samples: tuple[float, ...] = ()
    cpu_noise: str | None = None
    anchor_noise: str | None = None
    anchor_cpu_samples: tuple[float, ...] = ()
    anchor_cpu_noise: str | None = None
    backends: str | None = None
    right: tuple[Right, ...] = ()
    measured_on: MeasuredOn | None = None
    cap: float | None = None
    anchor_cap: float | None = None

    @property
    def timed(self) -> Samples:
        """Its samples, as they are judged: less is better."""
        return Samples(
            self.subject,
            self._times(self.samples),
            self.rounds,
            cpu_times=self._times(self.cpu_samples),
            session=self.paired,
            noise=self.noise,
            cpu_noise=self.cpu_noise,
            looks=self.measured_on.looks if self.measured_on else 1,
            cap=self.cap,
        )

    @property
    def anchor(self) -> Samples | None:
        """The anchor's samples; None if there is no anchor."""
        if not (self.anchor_samples or self.anchor_noise):
            return None
        return Samples(
            f"the anchor of {self.subject}",
            self._times(self.anchor_samples),
            self.anchor_rounds,
            cpu_times=self._times(self.anchor_cpu_samples),
            session=self.paired,
            problem=None if self.anchor_samples else self.anchor_noise,
            noise=self.anchor_noise,
            cpu_noise=self.anchor_cpu_noise,
            cap=self.anchor_cap,
        )

    def in_unit(self, of_speeds: RatioInterval) -> RatioInterval:
        """What was found of speeds, which are 1 / times, in the figure's own unit or as its ratio."""
        if self._is_speed:
            return of_speeds
        return RatioInterval(1 / of_speeds.ratio, 1 / of_speeds.high, 1 / of_speeds.low)

    @property
    def _is_speed(self) -> bool:
        return recorded_metric(self.key.metric).higher_is_better is True

    def _times(self, samples: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(1 / value for value in samples) if self._is_speed else samples


@dataclass(frozen=True)
class FigureSet:
    """figures.json: all figures of a release, with the dense model's reference and its weights' hash, if known."""

    KIND: ClassVar[str] = "release-figures"
    SCHEMA_VERSION: ClassVar[int] = 1

    source: str
    source_sha256: str | None
    seed: Seed
    figures: tuple[Figure, ...]

    def by_key(self, role: str) -> dict[FigureKey, Figure]:
        """The figures of a role."""
        return {figure.key: figure for figure in self.figures if figure.role == role}


def read_baseline(path: Path, wanted: Iterable[FigureKey]) -> FigureSet:
    """An earlier release's figures.

    Raises:
        InputError: No such file, another schema, a figure that it does not have, or one that no release can have.
    """
    baseline = read_record(FigureSet, path)
    for figure in baseline.figures:
        values = [value for value in (figure.value, *figure.samples) if value is not None]
        if recorded_metric(figure.key.metric) is not OWN_METRIC and min(values, default=0) < 0:
            raise InputError(
                f"{path}: no figure: {figure.key.describe()}", value=min(values), allowed="0 or more"
            )
    known = baseline.by_key(PRUNED)
    missing = [key.describe() for key in wanted if not any(same_figure(key, other) for other in known)]
    if missing:
        raise InputError(f"{path} has no {'; no '.join(dict.fromkeys(missing))}", field="baseline.file")
    return baseline


def check_same_model(baseline: FigureSet, source: str, sha256: str | None, where: Path) -> None:
    """Raise InputError if a baseline is of another dense model."""
    known = baseline.source_sha256 and sha256
    before, now = (baseline.source_sha256, sha256) if known else (baseline.source, source)
    if before != now:
        raise InputError(
            f"{where} is of another model: {baseline.source} ({baseline.source_sha256})",
            field="baseline.file",
            allowed=f"a release of {source} ({sha256})",
        )


def same_figure(planned: FigureKey, found: FigureKey) -> bool:
    """Whether a planned figure is this one; planned tasks and figures of own metrics are not named yet."""
    on = None if found.metric == "accuracy" and planned.on is None else found.on
    return means(found.metric, planned.metric) and planned == replace(found, metric=planned.metric, on=on)
