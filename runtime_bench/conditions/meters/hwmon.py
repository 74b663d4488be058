"""Sensors of boards that Linux shows as hwmon: INA chips on rails, and others that count energy or show power.

Of a sensor without power, voltage and current of the same number are multiplied. Which rails contain which, nothing
says: the one that shows most comes first.
"""

from __future__ import annotations

import re
from collections import Counter as Counts
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from statistics import fmean

from runtime_bench.conditions.meters.meter import (
    Counter,
    Facts,
    Meter,
    Source,
    Track,
    counting,
    multiplied,
    showing,
)

_FILE = re.compile(
    r"(/sys/class/hwmon/[\w.:-]+)/(?P<kind>energy|power|curr)(\d{1,3})_(?:input|average)", re.ASCII
)
_MICRO = 1e-6
"""Joules of energy's unit and watts of power's, and of the product of millivolts and milliamperes."""
_MOST_W = 2000.0
_CARDS = frozenset({"amdgpu", "radeon", "nouveau", "i915", "xe", "nvme"})
"""What is on a card of its own and tells of that alone."""


def _meters(facts: Facts, tracks: Mapping[str, Track]) -> Sequence[Meter]:
    return sorted(_each(facts, tracks), key=_mean_w, reverse=True)


def _each(facts: Facts, tracks: Mapping[str, Track]) -> Iterator[Meter]:
    supplies = {
        PurePosixPath(path).parent.name for path in facts if path.startswith("/sys/class/power_supply/")
    }
    names: Counts[str] = Counts()
    for path, track in tracks.items():
        found = _FILE.fullmatch(path)
        chip = facts.get(f"{found[1]}/name", "").strip() if found else ""
        if not found or chip in _CARDS or chip in supplies:
            continue
        folder, kind, number = found[1], found["kind"], found[3]
        label = facts.get(f"{folder}/{kind}{number}_label") or facts.get(f"{folder}/in{number}_label", "")
        domain = f"{chip or 'unnamed'} {label.strip() or kind + number}"
        names[domain] += 1
        domain += f" ({names[domain]})" if names[domain] > 1 else ""
        if kind == "energy":
            yield counting("hwmon counter", domain, track, Counter(_MICRO, _MOST_W))
        elif kind == "power":
            yield showing("hwmon power", domain, track, _MICRO, _MOST_W)
        elif volts := tracks.get(f"{folder}/in{number}_input"):
            yield multiplied("hwmon voltage x current", domain, volts, track, _MICRO, _MOST_W)


def _mean_w(meter: Meter) -> float:
    if not meter.track:
        return 0.0
    if not meter.counts:
        return fmean(one.value for one in meter.track)
    first, last = meter.track[0], meter.track[-1]
    return last.value / max(last.answered_s - first.asked_s, 1e-9)


HWMON = Source(
    "hwmon",
    """
    meter "$base"/sys/class/hwmon/*/energy[0-9]*_input "$base"/sys/class/hwmon/*/power[0-9]*_input
    meter "$base"/sys/class/hwmon/*/power[0-9]*_average
    for current in "$base"/sys/class/hwmon/*/curr[0-9]*_input; do
        number=${current##*/curr}
        test -e "${current%/*}/power$number" || meter "${current%/*}/in$number" "$current"
    done""",
    _meters,
    ("/sys/class/hwmon/*/name", "/sys/class/hwmon/*/*_label"),
)
