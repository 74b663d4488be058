"""95 % intervals of figures of a text by its windows and of a task by its items, alone and of two models on the same.

A figure of a text is a ratio of sums over windows, such as bits over bytes. The variance of such a figure, of a
difference of two or of the logarithm of their ratio, is that of the delete-one jackknife (Efron 1982),

    (m - 1) / m sum of (x_w - mean of x)^2

with x_w what m windows without window w say. Both models' figures lack the same window: that it is hard cancels.
Windows of one size have the variance of Cochran, Sampling Techniques, 2.11; those of unequal ones a larger one.
Intervals take Student's t with m - 1 degrees of freedom.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cfsp.errors import InputError
from runtime_bench.records.summary import CONFIDENCE, NORMAL_95

_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, two terms of its expansion do."""
_RESAMPLES = 10_000
_CELLS = (("1", "1"), ("1", "0"), ("0", "1"), ("0", "0"))  # what both models made of an item

Items = Sequence[str]
"""Of each task a character an item: 1 for a right answer, 0 for another one."""


@dataclass(frozen=True)
class Windows:
    """The figure of a text: the sum of `sums` over that of `sizes`, or exp of it, of windows in one order."""

    sums: tuple[float, ...]
    sizes: tuple[float, ...]
    exponential: bool = False

    def __post_init__(self) -> None:
        if not self.sums or len(self.sums) != len(self.sizes):
            raise InputError("not one sum and one size for each window", field="windows")
        if min(self.sizes) <= 0 or not all(map(math.isfinite, (*self.sums, *self.sizes))):
            raise InputError("sums that are not finite, or sizes that are not positive", field="windows")

    @property
    def value(self) -> float:
        return self._figure(sum(self.sums), sum(self.sizes))

    def _figure(self, of: float, over: float) -> float:
        return math.exp(min(of / over, 690.0)) if self.exponential else of / over

    def part(self, start: int, step: int) -> Windows:
        """Every `step`-th window."""
        return Windows(self.sums[start::step], self.sizes[start::step], self.exponential)

    def left_out(self) -> list[float]:
        """The figure without each of the windows, of which there are two at least."""
        of, over = sum(self.sums), sum(self.sizes)
        return [self._figure(of - s, over - n) for s, n in zip(self.sums, self.sizes, strict=True)]


class Interval(NamedTuple):
    """A figure, a difference or a ratio, and its 95 % interval; no ends if one window says nothing of noise."""

    value: float
    low: float | None
    high: float | None


def _half_width(left_out: Sequence[float]) -> float:
    """Half of the interval, from what is found without each window."""
    count, middle = len(left_out), sum(left_out) / len(left_out)
    degrees, z = count - 1, NORMAL_95
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    t = _T_95[degrees - 1] if degrees <= len(_T_95) else t
    return t * math.sqrt(degrees / count * sum((one - middle) ** 2 for one in left_out))


def window_interval(found: Windows) -> Interval:
    if len(found.sums) < 2:
        return Interval(found.value, None, None)
    half = _half_width(found.left_out())
    return Interval(found.value, found.value - half, found.value + half)


def compare_windows(base: Windows, new: Windows, *, difference: bool = False) -> Interval | None:
    """`new` over `base`, or minus it, on the same windows; None for a ratio to or of 0."""
    if len(base.sums) != len(new.sums):
        raise InputError(f"windows differ in number: {len(base.sums)} and {len(new.sums)}")
    before, now, alone = base.value, new.value, len(base.sums) < 2
    pairs = [] if alone else list(zip(new.left_out(), base.left_out(), strict=True))
    if difference:
        half = None if alone else _half_width([own - other for own, other in pairs])
        return Interval(
            now - before, *((None, None) if half is None else (now - before - half, now - before + half))
        )
    if min(before, now, *(one for pair in pairs for one in pair)) <= 0:
        return None
    if alone:
        return Interval(now / before, None, None)
    factor = math.exp(_half_width([math.log(own / other) for own, other in pairs]))
    return Interval(now / before, now / before / factor, now / before * factor)


def item_interval(right: Items) -> Interval:
    """The share of right answers, as the mean over tasks: Wilson's interval (1927), of several tasks by the squares of
    their distances from it (Zou and Donner 2008)."""
    shares, below, above = [], 0.0, 0.0
    for task in right:
        n, share, z = len(task), task.count("1") / len(task), NORMAL_95
        middle, scale = share + z**2 / (2 * n), 1 + z**2 / n
        half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        shares.append(share)
        below += (share - (middle - half) / scale) ** 2
        above += ((middle + half) / scale - share) ** 2
    value = sum(shares) / len(shares)
    return Interval(value, value - math.sqrt(below) / len(right), value + math.sqrt(above) / len(right))


def compare_items(base: Items, new: Items, *, difference: bool = False) -> Interval | None:
    """Share `new` over share `base`, or minus it, of the mean over tasks; None for a ratio to 0.

    Items are drawn, each with what both models made of it (Koehn 2004, "Statistical significance tests for machine
    translation evaluation"; Efron and Tibshirani 1993, chapter 8): that an item is hard cancels.
    """
    if [len(task) for task in base] != [len(task) for task in new]:
        raise InputError("items differ in number")
    before, now = (sum(task.count("1") / len(task) for task in side) / len(side) for side in (base, new))
    if not difference and not before:
        return None
    rng = np.random.default_rng(0)
    ours, theirs = np.zeros(_RESAMPLES), np.zeros(_RESAMPLES)
    for task, same_task in zip(new, base, strict=True):
        counts = Counter(zip(task, same_task, strict=True))
        shares = [counts[cell] / len(task) for cell in _CELLS]
        both, gained, lost, _ = rng.multinomial(len(task), shares, _RESAMPLES).T / len(task)
        ours, theirs = ours + both + gained, theirs + both + lost
    tail = (1 - CONFIDENCE) / 2
    # If no right answer of the other model is drawn, half of one stands for the ratio's sake.
    least = 0.5 / sum(map(len, new))
    drawn = (ours - theirs) / len(new) if difference else ours / np.maximum(theirs, least)
    low, high = np.quantile(drawn, [tail, 1 - tail], method="closest_observation")
    return Interval(now - before if difference else now / before, float(low), float(high))
