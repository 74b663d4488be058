"""figures.json: every figure that a release can be held to, with its samples, so that a later one can be compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from cfsp.errors import InputError
from cfsp.records import read_record
from cfsp.validation import Seed
from phoneready.figures.metrics import OWN_METRIC, FigureKey, means, recorded_metric

FIGURES_FILE = "figures.json"
PRUNED, DENSE = "pruned", "dense"


@dataclass(frozen=True)
class Figure:
    """One figure of a release.

    Attributes:
        key: Which one; the same in other releases of the same configuration.
        role: PRUNED, or DENSE for what the pruned one is compared with.
        subject: The file or checkpoint, by name.
        unit: As in BudgetVerdict.
        value: None where it could not be found.
        kind: How it came about: `exact`, or as in benchmark records.
        target: Where, as in benchmark records; None for what depends on no machine.
        samples: What it is the median of, in its unit, in the order taken.
        rounds: For each sample, the process that it came from, counted from 0.
        paired: Figures of one name were sampled in turns: their samples may be compared pair by pair.
        stderr: Standard error, of accuracies.
        low: Lower end, of bands, of what is the most of several, and by what a meter may be wrong.
        high: Upper end.
        failure: Why there is no value.
        noise: Why its samples tell more of the machine than of the file; None where they do not.
        conditions: What must be equal for two such figures to be comparable.
        higher_is_better: Direction, of own metrics that state it.
        anchor_samples: Of the file that was measured in turns with it, so that other sessions can be compared with it.
        anchor_rounds: For each of those, the process that it came from.
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

    @property
    def n_independent(self) -> int:
        """Independent samples: those of one process share what that process met."""
        return len(set(self.rounds)) if len(self.rounds) == len(self.samples) else len(self.samples)


@dataclass(frozen=True)
class FigureSet:
    """figures.json.

    Attributes:
        source: Reference of the dense model.
        source_sha256: Hash of its weights, where known.
        seed: Of the release.
        figures: All of them.
    """

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

    Args:
        path: Its figures.json.
        wanted: Figures that budgets are relative to.

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
    """Raise InputError where a baseline is of another dense model."""
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
