"""What a meter's readings come to in given windows of time, and what that lies between.

A reading tells of the moment at which it changed, which lies between the look before and the one that saw it. Between
two such moments a counter says how much there was and not when; a sensor says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from runtime_bench.conditions.meters.meter import CLOCK_S, Meter
from runtime_bench.conditions.meters.windows import Windows
from runtime_bench.records.energy import NOTHING, Joules
from runtime_bench.records.summary import NORMAL_95

PEAK = 2.0
"""No moment takes more than so many times what any interval between two changes takes on average."""
_LEAST_S = 1e-3


@dataclass(frozen=True)
class Change:
    """A moment at which a reading changed."""

    earliest_s: float  # It was not before
    seen_s: float  # The middle of the look that saw it
    latest_s: float  # It was not later
    value: float  # Joules or watts since then


def changes(meter: Meter) -> list[Change]:
    """The moments at which a meter's reading changed."""
    return [
        Change(
            before.asked_s, (after.asked_s + after.answered_s) / 2, after.answered_s + CLOCK_S, after.value
        )
        for before, after in pairwise(meter.track)
        if after.value != before.value
    ]


def update_s(moments: Sequence[Change]) -> float | None:
    """Seconds from one change to the next, the median; None of fewer than two."""
    gaps = [after.seen_s - before.seen_s for before, after in pairwise(moments)]
    return median(gaps) if gaps else None


def joules_in(meter: Meter, moments: Sequence[Change], windows: Windows) -> Joules:
    """The energy of all windows together."""
    return (_counted if meter.counts else _shown)(meter, moments, windows)


def _counted(meter: Meter, moments: Sequence[Change], windows: Windows) -> Joules:
    """Of a counter. Of an interval that lies partly inside, none or all of its energy may be inside, as far as no
    moment takes more than the peak; the counter's step is added once for two such ends."""
    total = NOTHING
    powers = [(after.value - before.value) / _between(before, after) for before, after in pairwise(moments)]
    peak = PEAK * max(powers)
    for before, after in pairwise(moments):
        inside = windows.within(before.earliest_s, after.latest_s)
        if not inside:
            continue
        whole, outside = after.value - before.value, after.latest_s - before.earliest_s - inside
        share = min(1.0, windows.within(before.seen_s, after.seen_s) / _between(before, after))
        low, high = max(0.0, whole - peak * outside), min(whole, peak * inside)
        slack = meter.step / 2 if outside > _LEAST_S else 0.0
        total += Joules(low - slack, min(max(low, share * whole), high), high + slack)
    for seconds, power in _unseen(moments, windows, powers):
        total += Joules(0.0, power * seconds, peak * seconds)
    return Joules(max(0.0, total.low), total.value, total.high)


def _unseen(
    moments: Sequence[Change], windows: Windows, powers: Sequence[float]
) -> Iterator[tuple[float, float]]:
    """Seconds of the windows before the first change and after the last one, with the power beside them."""
    yield windows.within(-math.inf, moments[0].seen_s), powers[0]
    yield windows.within(moments[-1].seen_s, math.inf), powers[-1]


def _shown(meter: Meter, moments: Sequence[Change], windows: Windows) -> Joules:
    """Of a sensor of power: between two changes the mean of both.

    A new reading may be as old as the look before, and the guess is half as old. To that come half a step, and what
    power did between two changes: their errors are independent.
    """
    age_s = median(one.seen_s - one.earliest_s for one in moments)
    new, old = (_mean_between(moments, windows, age) for age in (0.0, age_s))
    value, edges = (new + old) / 2, abs(new - old) / 2
    variance = sum(
        (windows.within(before.seen_s, after.seen_s) * watts) ** 2 / 12
        for (before, after), watts in zip(pairwise(moments), _moved(moments), strict=True)
    )
    error = edges + NORMAL_95 * math.sqrt(variance) + windows.seconds * meter.step / 2
    return Joules(max(0.0, value - error), value, value + error)


def _moved(moments: Sequence[Change]) -> Iterator[float]:
    """Watts by which power moved between two changes, by how fast it moved there and in the intervals beside, and no
    further than it ever did."""
    seconds = [_between(before, after) for before, after in pairwise(moments)]
    changes = [abs(after.value - before.value) for before, after in pairwise(moments)]
    speeds = [watts / length for watts, length in zip(changes, seconds, strict=True)]
    span = max(one.value for one in moments) - min(one.value for one in moments)
    for i, length in enumerate(seconds):
        yield min(span, length * max(speeds[max(0, i - 1) : i + 2]))


def _mean_between(moments: Sequence[Change], windows: Windows, age_s: float) -> float:
    """Joules of the windows, where each reading was so old when it was seen; before the first and after the last change
    power was as it was then."""
    first, last = moments[0], moments[-1]
    inner = sum(
        windows.within(before.seen_s - age_s, after.seen_s - age_s) * (before.value + after.value) / 2
        for before, after in pairwise(moments)
    )
    outer = windows.within(-math.inf, first.seen_s - age_s) * first.value
    return inner + outer + windows.within(last.seen_s - age_s, math.inf) * last.value


def _between(before: Change, after: Change) -> float:
    return max(after.seen_s - before.seen_s, _LEAST_S)
