"""What the trials so far say of points that were not tried."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from phoneready.figures.metrics import METRICS, metric_of
from phoneready.tune.limits import BudgetCheck, Judged, Limits
from phoneready.tune.predict import Observation, Prediction, Predictor, Prior
from phoneready.tune.space import Point

_LEAST = 1e-6
_OFFSETS = MappingProxyType({"file": 0.7, "allocation": 0.2, "align": 0.1, "recover": 0.5})


@dataclass(frozen=True)
class MeasuredPoint:
    """A point that was measured.

    Attributes:
        point: The point.
        removed: Share of FFN channels that went.
        file_bytes: Size of the file.
        divergence: Mean KL divergence over the texts, in nats.
        judged: The budgets' verdicts.
    """

    point: Point
    removed: float
    file_bytes: int
    divergence: float
    judged: Judged


@dataclass(frozen=True)
class _Scale:
    """How a kind of figure is predicted.

    Attributes:
        to: The figure as something positive that grows as it gets worse.
        back: Its inverse.
        x: What it follows: from the share removed.
        prior: What is believed of it.
    """

    to: Callable[[float], float]
    back: Callable[[float], float]
    x: Callable[[float], float]
    prior: Prior


def _same(value: float) -> float:
    return value


def _inverse(value: float) -> float:
    return 1 / max(value, _LEAST)


def _rest(value: float) -> float:
    return 1 - value


def _removed(share: float) -> float:
    return share + 0.02


def _quality(to: Callable[[float], float], back: Callable[[float], float], slope: float) -> _Scale:
    return _Scale(to, back, _removed, Prior(slope, 0.5, 0.3, _OFFSETS))


_DIVERGENCE = _quality(_same, _same, METRICS["kl_mean"].slope)
_COST = _Scale(_same, _same, _rest, Prior(0.7, 0.4, 0.3, _OFFSETS))
_SPEED = _Scale(_inverse, _inverse, _rest, Prior(0.7, 0.4, 0.3, _OFFSETS))


class Forecast:
    """Predictions from trials.

    Args:
        tried: The trials; without any nothing is predicted.
        limits: The budgets.
    """

    def __init__(self, tried: Sequence[MeasuredPoint], limits: Limits) -> None:
        self._tried, self._limits = tried, limits
        self._held: dict[str, list[tuple[MeasuredPoint, BudgetCheck]]] = {}
        for one in tried:
            for held in one.judged.held:
                if held.verdict.value is not None:
                    self._held.setdefault(held.name, []).append((one, held))
        self._predictor = functools.cache(self._make_predictor)

    def divergence(self, point: Point) -> Prediction | None:
        """The goal's KL divergence at a point, in nats."""
        if not self._tried:
            return None
        return self._divergence.predict(point.recipe.settings, _removed(point.prune_ratio))

    def figures(self, point: Point) -> dict[str, Prediction]:
        """What budgets limit and had to be measured, by the names that people read, in the figures' units."""
        found = {}
        for name, held in self._held.items():
            if not self._concerns(held[0], point) or metric_of(held[0][1].budget.metric).is_exact:
                continue
            scale = _scale(held[0][1])
            predicted = self._predictor(name).predict(point.recipe.settings, scale.x(point.prune_ratio))
            low, high = sorted((scale.back(predicted.low), scale.back(predicted.high)))
            found[held[0][1].label] = Prediction(scale.back(predicted.value), low, high)
        return found

    def knows(self, family: str) -> bool:
        """Whether any figure of a family that a budget limits was measured."""
        return any(held[0][1].family == family for held in self._held.values())

    def meets(self, point: Point, family: str) -> bool:
        """Whether a point is expected to be within all budgets of a family, as far as trials say anything."""
        return all(
            self._expected_excess(name, point) <= 0
            for name, held in self._held.items()
            if held[0][1].family == family and self._concerns(held[0], point)
        )

    @functools.cached_property
    def _divergence(self) -> Predictor:
        return Predictor(
            [
                Observation(one.point.recipe.settings, _removed(one.removed), max(one.divergence, _LEAST))
                for one in self._tried
            ],
            _DIVERGENCE.prior,
        )

    def _concerns(self, held: tuple[MeasuredPoint, BudgetCheck], point: Point) -> bool:
        """Whether a budget limits files of the point's kind."""
        files = held[1].budget.files
        return not files or point.recipe.item in files or "checkpoint" in files

    def _expected_excess(self, name: str, point: Point) -> float:
        held = self._held[name][0][1]
        scale = _scale(held)
        predicted = self._predictor(name).predict(point.recipe.settings, scale.x(point.prune_ratio)).value
        sign = 1 if held.budget.is_upper else -1
        return sign * (scale.back(predicted) - held.budget.limit)

    def _make_predictor(self, name: str) -> Predictor:
        scale = _scale(self._held[name][0][1])
        return Predictor(
            [
                Observation(
                    one.point.recipe.settings,
                    scale.x(one.removed),
                    max(scale.to(float(held.verdict.value or 0.0)), _LEAST),
                )
                for one, held in self._held[name]
            ],
            scale.prior,
        )


def _scale(held: BudgetCheck) -> _Scale:
    """Costs follow the size, speeds its inverse; a quality moves away from the best there is."""
    metric, budget = metric_of(held.budget.metric), held.budget
    if not metric.is_quality:
        return _COST if budget.is_upper else _SPEED
    best, sign = metric.best, 1 if budget.is_upper else -1
    if best is None or (budget.is_ratio and best):
        side = _same if budget.is_upper else _inverse
        return _quality(side, side, metric.slope)
    return _quality(lambda value: sign * (value - best), lambda lost: best + sign * lost, metric.slope)
