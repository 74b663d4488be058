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


@dataclass(frozen=True)
class Observation:
    """A point that was tried.

    Attributes:
        settings: Name of a setting -> its value there.
        x: What the figure follows; positive.
        y: The figure; positive.
    """

    settings: Mapping[str, str]
    x: float
    y: float


@dataclass(frozen=True)
class Prediction:
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
        self._fits = [_fit(X, y, mean, variances, noise) for noise in _NOISES]
        evidences = np.array([fit.log_evidence for fit in self._fits])
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
        means = np.array([float(row @ fit.mean) for fit in self._fits])
        variances = np.array(
            [
                float(row @ fit.covariance @ row) + noise**2 + unseen
                for fit, noise in zip(self._fits, _NOISES, strict=True)
            ]
        )
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


@dataclass(frozen=True)
class _Fit:
    mean: _Array
    covariance: _Array
    log_evidence: float


def _fit(X: _Array, y: _Array, mean: _Array, variances: _Array, noise: float) -> _Fit:
    """Posterior of the coefficients under a known noise; Bishop, Pattern Recognition and Machine Learning, 3.3."""
    residual = y - X @ mean
    marginal = X @ np.diag(variances) @ X.T + noise**2 * np.eye(len(y))
    solved = np.linalg.solve(marginal, np.column_stack([residual, X * variances]))
    gain = (X * variances).T
    posterior = mean + gain @ solved[:, 0]
    covariance = np.diag(variances) - gain @ solved[:, 1:]
    _, logdet = np.linalg.slogdet(marginal)
    evidence = -0.5 * float(residual @ solved[:, 0] + logdet)
    return _Fit(posterior, covariance, evidence)
