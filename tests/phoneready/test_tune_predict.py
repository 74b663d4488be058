"""Predictions from few trials: they go through what is known, and their intervals hold what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from phoneready.tune.predict import Observation, Predictor, Prior

PRIOR = Prior(1.2, 0.5, 0.3, {"allocation": 0.2})
CFSP, OTHER = {"allocation": "cfsp"}, {"allocation": "uniform"}


def curve(x: float, offset: float = 0.0) -> float:
    return math.exp(0.3 + 1.3 * math.log(x) + 0.2 * math.log(x) ** 2 + offset)


def test_a_smooth_curve_is_found_from_four_points() -> None:
    known = [Observation(CFSP, x, curve(x)) for x in (0.05, 0.15, 0.3, 0.5)]
    predictor = Predictor(known, PRIOR)
    for x in (0.1, 0.2, 0.4):
        found = predictor.predict(CFSP, x)
        assert found.value == pytest.approx(curve(x), rel=0.05)
        assert found.low < curve(x) < found.high


def test_what_a_setting_gains_is_carried_over_to_other_ratios() -> None:
    known = [Observation(CFSP, x, curve(x)) for x in (0.05, 0.15, 0.3, 0.5)]
    before = Predictor(known, PRIOR).predict(OTHER, 0.4)
    after = Predictor([*known, Observation(OTHER, 0.1, curve(0.1, -0.3))], PRIOR).predict(OTHER, 0.4)
    assert after.value == pytest.approx(curve(0.4, -0.3), rel=0.1)
    assert math.log(after.high / after.low) < math.log(before.high / before.low)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Curves drawn from the prior with 3 % noise: the interval is missed about one time in twenty."""
    rng = np.random.default_rng(0)
    inside = total = 0
    for _ in range(200):
        slope, bend = rng.normal(1.2, 0.4), rng.normal(0, 0.2)

        def y(x: float, slope: float = slope, bend: float = bend) -> float:
            u = math.log(x / 0.2)
            return math.exp(slope * u + bend * u * u + rng.normal(0, 0.03))

        predictor = Predictor([Observation(CFSP, x, y(x)) for x in rng.uniform(0.05, 0.5, 4)], PRIOR)
        for x in (0.1, 0.25, 0.45):
            found = predictor.predict(CFSP, x)
            inside += found.low <= y(x) <= found.high
            total += 1
    assert 0.90 <= inside / total <= 0.99
