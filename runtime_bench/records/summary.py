"""Summaries of a handful of timings: order statistics, moments, and a bootstrap of a ratio of medians.

Everything takes plain samples and returns None where there is nothing to say, never 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from cfsp.errors import InputError

_Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
NORMAL_95 = 1.96
"""Standard errors to each side of a normal estimate that hold 95 %."""
CONFIDENCE = 0.95
"""Of an interval, unless more or less is asked for."""
RESAMPLES = 4000
"""Draws of a bootstrap."""
_DRAWN_AT_ONCE = 2**21


@dataclass(frozen=True)
class RatioInterval:
    """A ratio and the interval its bootstrap distribution puts around it."""

    ratio: float
    low: float
    high: float


def finite_or_none(value: float | None) -> float | None:
    """`value`, or None where it is None, NaN or infinite."""
    return value if value is not None and math.isfinite(value) else None


def mean(samples: Sequence[float]) -> float | None:
    """Arithmetic mean; None without samples."""
    return finite_or_none(statistics.fmean(samples)) if samples else None


def stdev(samples: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1); None with fewer than two samples."""
    return finite_or_none(statistics.stdev(samples)) if len(samples) > 1 else None


def median(samples: Sequence[float]) -> float | None:
    """Middle value; None without samples."""
    return finite_or_none(statistics.median(samples)) if samples else None


def quantile(samples: Sequence[float], share: float) -> float | None:
    """Linearly interpolated quantile, `share` in [0, 1]; None without samples."""
    return finite_or_none(float(np.quantile(np.asarray(samples, np.float64), share))) if samples else None


def spread(samples: Sequence[float]) -> float | None:
    """p90 / p50; None with fewer than two samples or a median that is not positive."""
    middle, high = median(samples), quantile(samples, 0.9)
    if len(samples) < 2 or not middle or middle < 0 or high is None:
        return None
    return high / middle


def ratio_interval(
    numerator: Sequence[float],
    denominator: Sequence[float],
    *,
    paired: bool,
    numerator_rounds: Sequence[int] | None = None,
    denominator_rounds: Sequence[int] | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> RatioInterval:
    """Percentile bootstrap (Efron 1979) of median(numerator) / median(denominator), in logarithms.

    Rounds are drawn, not samples: those of one process share what it met (a cluster bootstrap, Davison and Hinkley
    1997, 3.8). `paired`: the same rounds are drawn of both sides, so that slow drift of the machine cancels.

    Args:
        numerator_rounds: Round of each sample; each is one of its own unless given.
        denominator_rounds: The same for the denominator.

    Raises:
        InputError: No samples, samples that are not positive and finite, or pairs of unequal number.
    """
    top = _by_round(_positive(numerator), numerator_rounds)
    bottom = _by_round(_positive(denominator), denominator_rounds)
    if paired and len(top) != len(bottom):
        raise InputError(f"paired rounds differ in number: {len(top)} and {len(bottom)}")
    logs = _log_ratios(top, bottom, np.random.default_rng(seed), resamples, paired=paired)
    return _interval(float(np.nanmedian(top) / np.nanmedian(bottom)), logs, confidence)


def quotient_interval(
    first: Sequence[Sequence[float]],
    first_rounds: Sequence[Sequence[int]],
    second: Sequence[Sequence[float]],
    second_rounds: Sequence[Sequence[int]],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> RatioInterval:
    """The bootstrap of `ratio_interval` for a quotient of two sessions' ratios.

    Args:
        first: Samples of numerator and denominator of the first session; drawn together if both have as many rounds.
        first_rounds: The round of each of their samples.
        second: The same of the session that it is divided by.
        second_rounds: The rounds of those.

    Raises:
        InputError: No samples, or samples that are not positive and finite.
    """
    ratio, logs, rng = 1.0, np.zeros(resamples), np.random.default_rng(seed)
    for sign, samples, rounds in ((1, first, first_rounds), (-1, second, second_rounds)):
        top, bottom = (_by_round(_positive(one), of) for one, of in zip(samples, rounds, strict=True))
        logs = logs + sign * _log_ratios(top, bottom, rng, resamples, paired=len(top) == len(bottom))
        ratio *= float(np.nanmedian(top) / np.nanmedian(bottom)) ** sign
    return _interval(ratio, logs, confidence)


def _log_ratios(
    top: _Floats, bottom: _Floats, rng: np.random.Generator, resamples: int, *, paired: bool
) -> _Floats:
    """(resamples,) of log(median / median) of drawn rounds, in portions that need little memory."""
    logs: list[_Floats] = []
    for count in portions(resamples, max(1, _DRAWN_AT_ONCE // max(top.size, bottom.size))):
        rows = rng.integers(0, len(top), (count, len(top)))
        others = rows if paired else rng.integers(0, len(bottom), (count, len(bottom)))
        logs.append(np.log(_drawn_medians(top, rows)) - np.log(_drawn_medians(bottom, others)))
    return np.concatenate(logs)


def _interval(ratio: float, logs: _Floats, confidence: float) -> RatioInterval:
    tail = (1 - confidence) / 2
    low, high = np.exp(np.quantile(logs, [tail, 1 - tail]))
    return RatioInterval(ratio, float(low), float(high))


def _by_round(values: _Floats, rounds: Sequence[int] | None) -> _Floats:
    """(rounds, most samples of a round), filled up with NaN."""
    if rounds is None or len(rounds) != len(values):
        return values[:, None]
    groups: dict[int, list[float]] = {}
    for number, value in zip(rounds, values, strict=True):
        groups.setdefault(number, []).append(value)
    return np.array(list(zip_longest(*groups.values(), fillvalue=np.nan))).T


def _drawn_medians(table: _Floats, rows: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> _Floats:
    drawn = table[rows].reshape(len(rows), -1)
    medians: _Floats = np.nanmedian(drawn, axis=1) if np.isnan(table).any() else np.median(drawn, axis=1)
    return medians


def portions(total: int, most: int) -> list[int]:
    """`total` in portions of `most`, and what is left."""
    full, rest = divmod(total, most)
    return [most] * full + ([rest] if rest else [])


def _positive(samples: Sequence[float]) -> _Floats:
    values = np.asarray(samples, np.float64)
    if not len(values) or not np.isfinite(values).all() or (values <= 0).any():
        raise InputError("a ratio needs positive, finite samples", field="samples", value=list(samples))
    return values
