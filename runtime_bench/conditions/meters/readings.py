"""What the script of `runtime_bench.conditions.script` wrote of meters, by file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from runtime_bench.conditions import android
from runtime_bench.conditions.looks import Look
from runtime_bench.conditions.meters.meter import Reading, Track
from runtime_bench.conditions.meters.service import CHARGE, VOLTAGE
from runtime_bench.conditions.script import FACT, GLANCE, IDLE_OVER, METERS, UNREADABLE

_SECONDS = r"\d{1,12}(?:\.\d{1,6})?"
_GLANCE = re.compile(rf"{GLANCE} ({_SECONDS}) ({_SECONDS})((?: (?:x|-?\d{{1,18}}))*)", re.ASCII)
_UPTIME = re.compile(rf"({_SECONDS})(?:\s|$)", re.ASCII)


@dataclass
class Readings:
    """Of one process."""

    tracks: dict[str, list[Reading]] = field(default_factory=dict)  # Path -> readings, in the order taken
    unreadable: dict[str, None] = field(default_factory=dict)  # Files that are there and may not be read
    facts: dict[str, str] = field(default_factory=dict)  # Path -> text, of files that do not change
    # From when to when nothing had been started yet, seconds since the machine was started; None where nobody
    # looked then
    idle: tuple[float, float] | None = None


def readings_of(text: str) -> Readings:
    """The readings that a script's output has, torn at the end or not."""
    found, paths = Readings(), list[str]()
    times: list[tuple[float, float]] = []
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == METERS:
            paths = rest.split()
        elif word == UNREADABLE:
            found.unreadable[rest] = None
        elif word == FACT:
            path, _, found.facts[path] = rest.partition(" ")
        elif word == IDLE_OVER and len(times) > 1:
            found.idle = times[0][1], times[-1][0]
        elif match := _GLANCE.fullmatch(line):
            times.append((float(match[1]), float(match[2])))
            _keep(found, paths, times, match[3].split())
    return found


def _keep(
    found: Readings, paths: Sequence[str], times: Sequence[tuple[float, float]], values: Sequence[str]
) -> None:
    """Take a round of readings; one that came before the round that it follows is by a clock that went wrong."""
    earlier = len(times) > 1 and times[-1][0] < times[-2][1]
    if len(values) != len(paths) or earlier or times[-1][0] > times[-1][1]:
        return
    for path, value in zip(paths, values, strict=True):
        if value != "x":
            found.tracks.setdefault(path, []).append(Reading(*times[-1], float(value)))


def answered(looks: Iterable[Look]) -> dict[str, Track]:
    """What Android's battery service said of its charge, by the names of `service`."""
    tracks: dict[str, list[Reading]] = {CHARGE: [], VOLTAGE: []}
    for look in looks:
        text = look.answers.get("battery")
        asked, told = (
            _UPTIME.match(t) for t in (look.files.get("/proc/uptime", ""), look.answers.get("battery_at", ""))
        )
        if text is None or asked is None or told is None or float(told[1]) < float(asked[1]):
            continue
        charge, voltage = android.charge_uah(text).value, android.voltage_mv(text).value
        if charge is not None and voltage is not None:
            for name, value in ((CHARGE, charge), (VOLTAGE, voltage)):
                tracks[name].append(Reading(float(asked[1]), float(told[1]), float(value)))
    return {name: tuple(track) for name, track in tracks.items() if track}
