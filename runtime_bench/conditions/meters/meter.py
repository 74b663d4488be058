"""A meter's readings, brought to joules that only grow, or to watts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

CLOCK_S = 0.01
"""/proc/uptime shows hundredths of a second."""


class Reading(NamedTuple):
    """What a file showed at some time between two looks at the clock, seconds since the machine was started."""

    asked_s: float
    answered_s: float
    value: float


Track = tuple[Reading, ...]
Facts = Mapping[str, str]
"""Path -> text, of files that do not change."""


@dataclass(frozen=True)
class Meter:
    """One meter."""

    method: str  # As `Metered` has it
    domain: str  # As `Metered` has it
    track: Track  # Joules since the first reading where it counts, else watts
    counts: bool  # Whether it counts joules
    step: float = 0.0  # Least difference between two readings, joules or watts; 0 where there is none
    least_w: float = 0.0  # What it would show at least of a machine that computes, in its unit
    on_battery: bool = False  # Whether it says nothing while power comes from outside
    problem: str = ""  # Why its readings say nothing; empty where nothing says so


@dataclass(frozen=True)
class Source:
    """A kind of meters that a machine may have."""

    name: str  # In words
    find: str  # Commands of a shell that call `meter FILE...` with what may be there, below "$base"
    # Makes the meters of facts and of the readings by path, the one that says most first
    meters: Callable[[Facts, Mapping[str, Track]], Sequence[Meter]]
    facts: tuple[str, ...] = ()  # Patterns of files that do not change, below /sys


@dataclass(frozen=True)
class Counter:
    """How a counter counts."""

    unit_j: float  # Joules of one
    most_w: float  # No machine takes more
    wraps_at: float | None = None  # Where it begins at 0 again; None where nothing says so
    falls: bool = False  # Whether it counts what is left


def counting(method: str, domain: str, track: Track, counter: Counter, step: float | None = None) -> Meter:
    """A meter that counts: joules since its first reading, wraps undone.

    More than it can have counted since it changed last, and a step, is a jump; where it may have gone round more than
    once since then, it says nothing.
    """
    step = step_of(track) if step is None else step
    total, problem = 0.0, ""
    grown = [reading._replace(value=0.0) for reading in track[:1]]
    changed_s: float | None = None
    for before, after in pairwise(track):
        units = _difference(before, after, counter)
        if units:
            problem = problem or _impossible(units, step, changed_s, (before, after), counter)
            changed_s = before.asked_s
        total += max(units, 0.0) * counter.unit_j
        grown.append(after._replace(value=total))
    return Meter(method, domain, tuple(grown), counts=True, step=step * counter.unit_j, problem=problem)


def showing(
    method: str, domain: str, track: Track, unit_w: float, most_w: float, step: float | None = None
) -> Meter:
    """A meter that shows power, whichever sign it has; one that changes its sign says nothing."""
    watts = tuple(reading._replace(value=abs(reading.value) * unit_w) for reading in track)
    signs = {math.copysign(1, reading.value) for reading in track if reading.value}
    most = max((reading.value for reading in watts), default=0.0)
    problem = "it changed its sign: power went in and out" if len(signs) > 1 else ""
    if most > most_w:
        problem = f"it showed {most:.4g} W, which no such thing takes"
    step = (step_of(track) if step is None else step) * unit_w
    return Meter(method, domain, watts, counts=False, step=step, problem=problem)


def multiplied(method: str, domain: str, volts: Track, amperes: Track, unit_w: float, most_w: float) -> Meter:
    """A meter that shows a voltage and a current, which are read one after the other; `unit_w` is of their product."""
    both = beside(amperes, volts)
    track = tuple(one._replace(value=one.value * other) for one, other in both)
    step = step_of(amperes) * fmean(other for _, other in both) if both else 0.0
    return showing(method, domain, track, unit_w, most_w, step)


def beside(track: Track, other: Track) -> list[tuple[Reading, float]]:
    """Readings, each with what another file showed in the same round."""
    values = {one[:2]: one.value for one in other}
    return [(one, values[one[:2]]) for one in track if one[:2] in values]


def together(meters: Sequence[Meter]) -> Meter:
    """The sum of meters of one kind, of the rounds in which all of them were read."""
    sums = {one[:2]: one.value for one in meters[0].track}
    for meter in meters[1:]:
        values = {one[:2]: one.value for one in meter.track}
        sums = {at: value + values[at] for at, value in sums.items() if at in values}
    return replace(
        meters[0],
        track=tuple(Reading(*at, value) for at, value in sums.items()),
        step=sum(meter.step for meter in meters),
        problem=next((meter.problem for meter in meters if meter.problem), ""),
    )


def _difference(before: Reading, after: Reading, counter: Counter) -> float:
    """What was counted from one reading to the next, in the counter's unit; less than 0 is what cannot be."""
    units = (before.value - after.value) if counter.falls else (after.value - before.value)
    return units + counter.wraps_at if units < 0 and counter.wraps_at is not None else units


def _impossible(
    units: float, step: float, changed_s: float | None, readings: tuple[Reading, Reading], counter: Counter
) -> str:
    """Why a difference cannot be; empty where it can. Since when the counter had stood still before its first change is
    not known, nor what it might have counted."""
    if units < 0:
        return f"it went back by {-units * counter.unit_j:.4g} J"
    before, after = readings
    seconds = after.answered_s + CLOCK_S - (before.asked_s if changed_s is None else changed_s)
    most = counter.most_w * seconds / counter.unit_j
    if counter.wraps_at is not None and counter.wraps_at <= most:
        return f"it may have gone round more than once in the {seconds:.4g} s between two changes"
    if changed_s is not None and units > most + step:
        return f"it jumped by {units * counter.unit_j:.4g} J in {seconds:.4g} s"
    return ""


def step_of(track: Track) -> float:
    """The largest number of which all differences of readings, whole numbers, are multiples; 0 without any."""
    return float(math.gcd(*(round(abs(after.value - before.value)) for before, after in pairwise(track))))
