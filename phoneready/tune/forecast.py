"""What the trials so far say of points that were not tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from phoneready.figures.metrics import CHECKPOINT, METRICS, metric_of
from phoneready.settings.structures import STRUCTURES
from phoneready.tune.limits import BudgetCheck, Judged
from phoneready.tune.predict import Observation, Prediction, Predictor, Prior
from phoneready.tune.result import TrialRow
from phoneready.tune.space import Point

_LEAST = 1e-6
_CURVATURE_SD = 0.3
_OFFSETS = MappingProxyType(
    {"item": 0.7, "allocation": 0.2, "align": 0.1, "recover": 0.5} | dict.fromkeys(STRUCTURES, 0.7)
)


@dataclass(frozen=True)
class MeasuredPoint:
    """A trial, and what the budgets say of it."""

    row: TrialRow
    judged: Judged

    @property
    def point(self) -> Point:
        """What was measured."""
        return self.row.point


@dataclass(frozen=True)
class _Scale:
    """A figure as something positive that grows as it gets worse: (sign * (figure - best)) ** power.

    Attributes:
        slope: d log of it / d log of what it follows, that is expected before any trial.
        slope_sd: How far that may be off.
        of_size: Whether it follows what stays of the model, or what went.
        best: What it moves away from.
        sign: 1, or -1 of what gets worse as it gets less.
        power: 1, or -1 of what gets worse as it gets closer to `best`.
    """

    slope: float
    slope_sd: float = 0.5
    of_size: bool = False
    best: float = 0.0
    sign: int = 1
    power: int = 1

    def to(self, figure: float) -> float:
        return max(self.sign * (figure - self.best), _LEAST) ** self.power

    def back(self, lost: float) -> float:
        return self.best + self.sign * max(lost, _LEAST) ** self.power

    def x(self, removed: float) -> float:
        return 1 - removed if self.of_size else removed + 0.02


def _scale(check: BudgetCheck) -> _Scale:
    """Costs follow the size, speeds its inverse; a quality moves away from the best there is."""
    metric, budget = metric_of(check.budget.metric), check.budget
    side = 1 if budget.is_upper else -1
    if not metric.is_quality:
        return _Scale(0.7, slope_sd=0.4, of_size=True, power=side)
    if metric.best is None or (budget.is_ratio and metric.best):
        return _Scale(metric.slope, power=side)
    return _Scale(metric.slope, best=metric.best, sign=side)


class _Curve:
    """One figure over all points, from those at which it was measured."""

    def __init__(self, scale: _Scale, measured: Sequence[tuple[MeasuredPoint, float]]) -> None:
        known = [
            Observation(one.point.recipe.settings, scale.x(one.row.removed), scale.to(value))
            for one, value in measured
        ]
        prior = Prior(scale.slope, scale.slope_sd, _CURVATURE_SD, _OFFSETS)
        self._scale, self._predictor = scale, Predictor(known, prior)

    def at(self, point: Point) -> Prediction:
        predicted = self._predictor.predict(point.recipe.settings, self._scale.x(point.prune_ratio))
        value, *ends = map(self._scale.back, predicted)
        return Prediction(value, min(ends), max(ends))


@dataclass(frozen=True)
class _Limited:
    """A figure that a budget limits.

    Attributes:
        check: At the first trial that has the figure.
        files: What trials' budgets name: each only files that its trial makes, or none of them, which is all.
        curve: The figure over all points.
    """

    check: BudgetCheck
    files: frozenset[tuple[str, ...]]
    curve: _Curve

    def concerns(self, item: str) -> bool:
        """Whether files of a format are limited, as far as trials tell."""
        return any(not names or item in names or CHECKPOINT in names for names in self.files)


class Forecast:
    """Predictions from trials.

    Args:
        tried: The trials; without any nothing is predicted.
    """

    def __init__(self, tried: Sequence[MeasuredPoint]) -> None:
        divergence = _Scale(METRICS["kl_mean"].slope)
        self._divergence = _Curve(divergence, [(one, one.row.divergence) for one in tried]) if tried else None
        ratios = [(one, one.row.bits_ratio) for one in tried if one.row.bits_ratio is not None]
        self._bits_ratio = _Curve(_Scale(METRICS["bits_per_byte"].slope), ratios) if ratios else None
        checks: dict[str, list[BudgetCheck]] = {}
        measured: dict[str, list[tuple[MeasuredPoint, float]]] = {}
        for one in tried:
            for check in one.judged.held:
                if check.verdict.value is not None:
                    checks.setdefault(check.name, []).append(check)
                    measured.setdefault(check.name, []).append((one, check.verdict.value))
        self._limited = [
            _Limited(
                same[0],
                frozenset(check.budget.files for check in same),
                _Curve(_scale(same[0]), measured[name]),
            )
            for name, same in checks.items()
        ]

    def divergence(self, point: Point) -> Prediction | None:
        """The goal's KL divergence at a point, in nats."""
        return self._divergence.at(point) if self._divergence else None

    def bits_ratio(self, point: Point) -> Prediction | None:
        """Bits per byte at a point, over the dense model's."""
        return self._bits_ratio.at(point) if self._bits_ratio else None

    def figures(self, point: Point) -> dict[str, Prediction]:
        """What budgets limit and had to be measured, by the names that people read, in the figures' units."""
        return {
            check.label: curve.at(point)
            for check, curve in self._concerning(point)
            if not metric_of(check.budget.metric).is_exact
        }

    @property
    def knows_quality(self) -> bool:
        """Whether any quality that a budget limits was measured."""
        return any(limited.check.is_quality for limited in self._limited)

    def meets(self, point: Point, *, quality: bool) -> bool:
        """Whether a point is expected to be within all budgets of qualities, or of costs, as far as trials tell.

        What follows from a point's shape is no expectation, and left out.
        """
        return all(
            check.excess(curve.at(point).value) <= 0
            for check, curve in self._concerning(point)
            if check.is_quality == quality
            and not (point.recipe.is_sized and metric_of(check.budget.metric).is_exact)
        )

    def _concerning(self, point: Point) -> Iterator[tuple[BudgetCheck, _Curve]]:
        """The figures whose budgets limit files of the point's kind."""
        for limited in self._limited:
            if limited.concerns(point.recipe.item):
                yield limited.check, limited.curve
