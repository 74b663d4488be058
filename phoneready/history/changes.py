"""Where a series of figures changed: steps and drifts that its noise does not explain.

A sampled series is held, in logarithms, against two families of shapes: a step before any run, and a rise or fall that
begins at any run and goes on to the end. The statistic is the largest correlation of the series with any of them,

    R = max_j |<u_j, x - mean x>| / |x - mean x|

u_j being the centred shapes of length one. Of noise that is independent from run to run, R has one distribution,
whatever the size; its quantile is found by drawing such noise with a fixed seed. The noise is thus the own scatter of
the series. Where runs come with intervals of their own, the change has to stand out of those too: max_j |<u_j, x>| /
error is held against the same draws. With fewer than MIN_RUNS runs the intervals are all there is.

What is found is split off, and both sides are searched again (binary segmentation).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

STEP, DRIFT = "step", "drift"
MIN_RUNS = 8
"""Runs from which their scatter says how large the noise is."""
_RISE_RUNS = 4
"""Fewest runs that make a drift."""
_DRAWS, _SEED, _CHUNK = 40_000, 0, 4_000

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """A change of a series.

    Attributes:
        kind: STEP or DRIFT.
        first: Number of the first run that is different.
        before: Typical figure before.
        after: Typical figure after a step; the figure that a drift has come to.
        noise: Relative scatter of single runs that it was held against; 0 of exact figures.
    """

    kind: str
    first: int
    before: float
    after: float
    noise: float

    @property
    def ratio(self) -> float:
        """after / before; inf where before alone is 0."""
        return _ratio(self.after, self.before)


def exact_changes(values: Sequence[float], threshold: float) -> tuple[Change, ...]:
    """Changes of figures without noise, such as sizes: all that are larger than the threshold.

    Many small moves in one direction that add up to more are a drift.

    Args:
        values: One figure a run.
        threshold: Relative change that counts.
    """
    changes, level, since = [], 0, 0
    for run in range(1, len(values)):
        if values[run] == values[level]:
            since = run
            continue
        if abs(_ratio(values[run], values[level]) - 1) <= threshold:
            continue
        sudden = abs(_ratio(values[run], values[run - 1]) - 1) > threshold / 2
        first = run if sudden else since + 1
        changes.append(Change(STEP if sudden else DRIFT, first, values[level], values[run], 0.0))
        level = since = run
    return tuple(changes)


def sampled_changes(
    values: Sequence[float],
    errors: Sequence[float | None],
    *,
    threshold: float,
    false_alarms: float,
) -> tuple[Change, ...]:
    """Changes of measured figures.

    Args:
        values: One positive figure a run.
        errors: Relative standard error of each, from its own samples; None where it has none.
        threshold: Relative change that counts, however sure it is.
        false_alarms: Chance that a series of independent noise shows a change.
    """
    x = np.log(np.asarray(values, np.float64))
    known = [error for error in errors if error is not None]
    error = math.sqrt(sum(e * e for e in known) / len(known)) if known else None
    changes = list(_search(x, 0, error, threshold, false_alarms))
    return tuple(sorted(changes, key=lambda change: change.first))


def _search(
    x: _Array, offset: int, error: float | None, threshold: float, false_alarms: float
) -> Iterator[Change]:
    n = len(x)
    if n < 3 or (n < MIN_RUNS and error is None):
        return
    shapes = _shapes(n)
    centred = x - x.mean()
    products = np.abs(shapes @ centred)
    best = int(products.argmax())
    if not _stands_out(n, float(products[best]), float(np.linalg.norm(centred)), error, false_alarms):
        return
    change = _describe(x, best, offset, error)
    if abs(change.ratio - 1) <= threshold:
        return
    yield change
    first = change.first - offset
    yield from _search(x[:first], offset, error, threshold, false_alarms)
    if change.kind == STEP:
        yield from _search(x[first:], change.first, error, threshold, false_alarms)


def _stands_out(n: int, product: float, length: float, error: float | None, false_alarms: float) -> bool:
    correlations, products = _null(n)
    rank = 1 - false_alarms
    if error is not None and product <= error * float(np.quantile(products, rank)):
        return False
    return n < MIN_RUNS or product > length * float(np.quantile(correlations, rank))


def _describe(x: _Array, shape: int, offset: int, error: float | None) -> Change:
    n = len(x)
    if shape < n - 1:
        first, kind = shape + 1, STEP
        before, after = float(np.median(x[:first])), float(np.median(x[first:]))
        rest = np.concatenate([x[:first] - x[:first].mean(), x[first:] - x[first:].mean()])
    else:
        hinge, kind = shape - (n - 1), DRIFT
        ramp = np.maximum(0.0, np.arange(n) - hinge)
        slope, level = np.polyfit(ramp, x, 1)
        first, before, after = hinge + 1, float(level), float(level + slope * ramp[-1])
        rest = x - level - slope * ramp
    scatter = math.sqrt(float(rest @ rest) / (n - 2))
    noise = max(scatter, error or 0.0)
    return Change(kind, offset + first, math.exp(before), math.exp(after), noise)


@functools.cache
def _shapes(n: int) -> _Array:
    """(n - 1 steps and the drifts, n): centred, of length one."""
    runs = np.arange(n)
    steps = [runs >= first for first in range(1, n)]
    drifts = [np.maximum(0, runs - hinge) for hinge in range(n - _RISE_RUNS)]
    rows = np.asarray([*steps, *drifts], np.float64)
    rows -= rows.mean(1, keepdims=True)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


@functools.cache
def _null(n: int) -> tuple[_Array, _Array]:
    """(draws,) of both statistics for n runs of standard normal noise: relative to its scatter, and as it is."""
    rng, shapes = np.random.default_rng(_SEED), _shapes(n)
    correlations, products = [], []
    for _ in range(0, _DRAWS, _CHUNK):
        noise = rng.standard_normal((_CHUNK, n))
        noise -= noise.mean(1, keepdims=True)
        largest = np.abs(noise @ shapes.T).max(1)
        products.append(largest)
        correlations.append(largest / np.linalg.norm(noise, axis=1))
    return np.concatenate(correlations), np.concatenate(products)


def _ratio(now: float, before: float) -> float:
    if before:
        return now / before
    return 1.0 if now == before else math.inf
