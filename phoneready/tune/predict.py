"""What a figure will be at a point that was not tried, with an interval, from the few points that were.

    log y = intercept + one offset for every setting + slope u + curvature u^2 + noise

is fitted by Bayesian linear regression, u being the logarithm of what the figure follows (the share of channels
removed, of a quality; the size of the file, of a time). The offsets are shared: what an allocation gains at one ratio,
it is expected to gain at others. The priors are weak but not flat, so that one point gives a prediction, if a wide one;
the noise is averaged over a grid by how well it explains the points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime_bench.records.summary import NORMAL_95

_Array = npt.NDArray[np.float64]
_NOISES = np.geomspace(0.003, 0.3, 24)


@dataclass(frozen=True)
class Prior:
    """What is believed of a figure before any trial, in logarithms.

    Attributes:
        slope: d log y / d u that is expected.
        slope_sd: How far it may be off.
        curvature_sd: Of the second-order term.
        offset_sd: Setting -> how far its values may lie apart.
    """

    slope: float
    slope_sd: float
    curvature_sd: float
    offset_sd: Mapping[str, float]


class Observation(NamedTuple):
    """A point that was tried: its settings by name, what the figure follows, and the figure; both positive."""

    settings: Mapping[str, str]
    x: float
    y: float


class Prediction(NamedTuple):
    """A figure that was not measured: the middle, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Predictor:
    """A figure over ratios and settings.

    Args:
        observations: At least one.
        prior: What is believed before.
    """

    def __init__(self, observations: Sequence[Observation], prior: Prior) -> None:
        self._prior = prior
        self._centre = float(np.mean([math.log(o.x) for o in observations]))
        values = {(name, value) for o in observations for name, value in o.settings.items()}
        self._columns = {key: 3 + i for i, key in enumerate(sorted(values))}
        X = np.stack([self._row(o.settings, o.x) for o in observations])
        y = np.array([math.log(o.y) for o in observations])
        mean, variances = self._prior_of_columns(float(y.mean()))
        # The posterior of the coefficients under every noise; Bishop, Pattern Recognition and Machine Learning, 3.3.
        residual, gain = y - X @ mean, (X * variances).T
        marginals = X @ gain + (_NOISES**2)[:, None, None] * np.eye(len(y))
        solved = np.linalg.solve(marginals, np.column_stack([residual, gain.T])[None])
        self._means = mean + solved[:, :, 0] @ gain.T
        self._covariances = np.diag(variances) - gain @ solved[:, :, 1:]
        evidences = -0.5 * (solved[:, :, 0] @ residual + np.linalg.slogdet(marginals)[1])
        weights = np.exp(evidences - evidences.max())
        self._weights = weights / weights.sum()

    def predict(self, settings: Mapping[str, str], x: float) -> Prediction:
        """The figure of a new trial there."""
        row = self._row(settings, x)
        # A value of a setting that no trial had is as uncertain as its prior says.
        unseen = sum(
            self._prior.offset_sd.get(name, 0.0) ** 2
            for name, value in settings.items()
            if (name, value) not in self._columns
        )
        means = self._means @ row
        variances = self._covariances @ row @ row + _NOISES**2 + unseen
        middle = float(self._weights @ means)
        spread = math.sqrt(float(self._weights @ (variances + means**2)) - middle**2)
        low, high = (math.exp(middle + sign * NORMAL_95 * spread) for sign in (-1, 1))
        return Prediction(math.exp(middle), low, high)

    def _row(self, settings: Mapping[str, str], x: float) -> _Array:
        u = math.log(x) - self._centre
        row = np.zeros(3 + len(self._columns))
        row[:3] = 1.0, u, u * u
        for key in settings.items():
            if key in self._columns:
                row[self._columns[key]] = 1.0
        return row

    def _prior_of_columns(self, level: float) -> tuple[_Array, _Array]:
        p = self._prior
        mean = np.zeros(3 + len(self._columns))
        mean[:2] = level, p.slope
        sd = np.zeros_like(mean)
        sd[:3] = 2.0, p.slope_sd, p.curvature_sd
        for (name, _), column in self._columns.items():
            sd[column] = max(p.offset_sd.get(name, 0.0), 1e-6)
        return mean, sd**2
