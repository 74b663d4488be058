"""Joules of a process's samples, from meter readings in the text of `runtime_bench.conditions.script`.

Two sources: RAPL counters of Intel's and AMD's processors (reads need root since Linux 5.10, CVE-2020-8694), and the
battery's power, or its current times voltage, while there is no external power. A reading is known at the moment at
which it changed. Between two changes a counter says how much there was but not when, and a sensor that power was
between both of its values: that gives the bounds.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from runtime_bench.conditions.script import FACT, METERS, READING, UNREADABLE
from runtime_bench.records.reported import Conditions, Joules, Metered, ProcessEnergy

_RAPL, _RAPL_MOST_W, _BATTERY_MOST_W = "RAPL counter", 2000.0, 250.0
"""No such meter shows more."""
_BATTERY_LEAST_W = 0.05
"""A battery that shows less of a device that computes has another unit."""
_BETWEEN_S = 0.02
"""Samples that follow each other so closely are metered as one."""
_SECONDS = r"\d{1,12}(?:\.\d{1,6})?"
_READING = re.compile(rf"{READING} ({_SECONDS}) ({_SECONDS})((?: (?:x|-?\d{{1,18}}))*)", re.ASCII)
_ZONE = re.compile(r"(/sys/class/powercap/intel-rapl:\d+)/energy_uj", re.ASCII)
_BATTERY = re.compile(r"(/sys/class/power_supply/([^/]+))/(power_now|current_now)", re.ASCII)
Track = list[tuple[float, float]]
"""(seconds since boot, value) of one file."""
Spans = Sequence[tuple[float, float]]
"""Begin and end of each sample, seconds since boot."""


class Step(NamedTuple):
    """Energy between two changes of a reading. `earliest_s` is the last reading before the first of them."""

    earliest_s: float
    begin_s: float
    end_s: float
    joules: Joules


def energy_of(text: str, spans_ns: Sequence[tuple[int, int]], seen: Conditions) -> ProcessEnergy:
    """What the meters reported of the samples of a process.

    `text` is the output of the script, possibly torn at the end, `spans_ns` begin and end of each sample, nanoseconds
    since boot; `seen` says whether there was external power.
    """
    tracks, facts, unreadable = _read(text)
    hidden = None
    if unreadable:
        root = ": most systems allow only root" if "powercap" in unreadable[0] else ""
        hidden = f"{unreadable[0]} may not be read{root}"
    if not tracks:
        return ProcessEnergy(hidden=hidden or "neither RAPL nor a battery meters energy")
    if not seen.samples_s:
        return ProcessEnergy(hidden="the times of samples are unknown, or by another clock")
    spans = list[tuple[float, float]]()
    for begin, end in sorted((begin / 1e9, end / 1e9) for begin, end in spans_ns):
        if spans and begin - spans[-1][1] < _BETWEEN_S:
            spans[-1] = spans[-1][0], end
        else:
            spans.append((begin, end))
    return ProcessEnergy((*_rapl(tracks, facts, spans), *_batteries(tracks, facts, spans, seen)), hidden)


def _read(text: str) -> tuple[dict[str, Track], dict[str, str], list[str]]:
    """Readings by path, constant files, and paths that may not be read."""
    tracks: dict[str, Track] = {}
    facts: dict[str, str] = {}
    unreadable, paths, last = list[str](), list[str](), 0.0
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == METERS:
            paths = rest.split()
        elif word == UNREADABLE:
            unreadable.append(rest)
        elif word == FACT:
            path, _, facts[path] = rest.partition(" ")
        elif match := _READING.fullmatch(line):
            asked, answered, values = float(match[1]), float(match[2]), match[3].split()
            if len(values) == len(paths) and last <= asked <= answered:  # else the clock went wrong
                last = answered
                for path, value in zip(paths, values, strict=True):
                    if value != "x":
                        tracks.setdefault(path, []).append(((asked + answered) / 2, float(value)))
    return tracks, facts, unreadable


def _rapl(tracks: Mapping[str, Track], facts: Mapping[str, str], spans: Spans) -> Iterator[Metered]:
    """The packages of all sockets together."""
    total: Metered | None = None
    for path, track in tracks.items():
        match = _ZONE.fullmatch(path)
        if match is None or not facts.get(f"{match[1]}/name", "").startswith("package"):
            continue
        limit = facts.get(f"{match[1]}/max_energy_range_uj", "").strip()
        wraps = float(limit) if re.fullmatch(r"\d{1,18}", limit, re.ASCII) else 0.0
        changes = [(at, now[0], now[1]) for (at, old), now in pairwise(track) if now[1] != old]
        steps, problem = list[Step](), ""
        for (earliest, begin, before), (_, end, after) in pairwise(changes):
            units = after - before
            units += wraps if units < 0 else 0.0
            if units < 0 or units * 1e-6 > _RAPL_MOST_W * (end - earliest):
                problem = f"it jumped by {units * 1e-6:.4g} J in {end - begin:.4g} s"
            elif wraps and wraps * 1e-6 <= _RAPL_MOST_W * (end - earliest):
                problem = f"it may have wrapped more than once in {end - begin:.4g} s"
            steps.append(Step(earliest, begin, end, Joules(0.0, units * 1e-6, units * 1e-6)))
        one = _metered(_RAPL, "package", steps, spans, problem)
        if total is None or one.joules is None:
            total = one
        elif total.joules is not None:
            total = replace(total, joules=total.joules + one.joules)
    if total is not None:
        yield total


def _batteries(
    tracks: Mapping[str, Track], facts: Mapping[str, str], spans: Spans, seen: Conditions
) -> Iterator[Metered]:
    """The battery's power; several batteries report nothing of the whole."""
    found = {match[2]: match[1] for path in tracks if (match := _BATTERY.fullmatch(path))}
    own = {name: path for name, path in found.items() if facts.get(f"{path}/type", "").strip() == "Battery"}
    own = {name: path for name, path in own.items() if facts.get(f"{path}/scope", "").strip() != "Device"}
    if "battery" in own:  # Android's; gauges of the same one may stand beside it
        own = {"battery": own["battery"]}
    states, problem = {state for state in seen.charging if state is not None}, ""
    if not states:
        problem = f"whether there was external power is unknown: {seen.hidden.get('charging', 'no reading')}"
    elif True in states:
        problem = "there was external power, so the battery does not show what is used"
    elif len(own) > 1:
        problem = "the device has several batteries"
    for name, path in own.items():
        method = "battery power"
        watts = [(at, value * 1e-6) for at, value in tracks.get(f"{path}/power_now", ())]
        if not watts:
            method, volts = "battery current x voltage", dict(tracks.get(f"{path}/voltage_now", ()))
            amperes = tracks.get(f"{path}/current_now", ())
            watts = [(at, value * volts[at] * 1e-12) for at, value in amperes if at in volts]
        if not watts:
            continue
        why = problem
        if len({value > 0 for _, value in watts if value}) > 1:
            why = why or "its sign changed: power went in and out"
        if (most := max(abs(value) for _, value in watts)) > _BATTERY_MOST_W:
            why = why or f"it showed {most:.4g} W, which no such device takes"
        # Power stays what it was last, until a reading differs.
        moments = [watts[0], *(now for old, now in pairwise(watts) if now[1] != old[1]), watts[-1]]
        steps = []
        for (begin, before), (end, after) in pairwise(moments):
            low, high = sorted((abs(before) * (end - begin), abs(after) * (end - begin)))
            steps.append(Step(begin, begin, end, Joules(low, (low + high) / 2, high)))
        one = _metered(method, f"whole device, at {name}", steps, spans, why)
        if one.joules and one.joules.high < _BATTERY_LEAST_W * one.seconds:
            shown = f"it showed {one.joules.value / one.seconds:.2g} W of a device that computed"
            one = replace(one, joules=None, problem=f"{shown}: its unit is another one")
        yield one


def _metered(method: str, domain: str, steps: Sequence[Step], spans: Spans, problem: str) -> Metered:
    seconds = round(sum(end - begin for begin, end in spans), 6)
    if not problem and len(steps) < 2:
        problem = "its reading hardly changed: it is stuck, or too coarse for so short a run"
    if not problem and not (steps[0].begin_s <= spans[0][0] and spans[-1][1] <= steps[-1].end_s):
        problem = "it did not change before the first sample and after the last one"
    if problem:
        return Metered(method, domain, seconds, problem=problem)
    total, ends = Joules(0.0, 0.0, 0.0), [step.end_s for step in steps]
    for begin, end in spans:
        for step in steps[bisect_left(ends, begin) :]:
            if step.earliest_s >= end:
                break
            joules, length = step.joules, step.end_s - step.begin_s
            share = max(0.0, min(end, step.end_s) - max(begin, step.begin_s)) / length if length else 0.0
            if method == _RAPL:  # of a part of the step anything from none to all
                whole = begin <= step.earliest_s and step.end_s <= end
                total += Joules(joules.value if whole else 0.0, share * joules.value, joules.value)
            else:
                total += joules.times(share)
    return Metered(method, domain, seconds, total)
