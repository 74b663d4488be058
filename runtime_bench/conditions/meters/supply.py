"""Power supplies of Linux and Android: the battery's gauge, and on boards without one the input.

Units are those of Linux's power supply class: microvolts, microamperes, microwatts, microampere hours and microwatt
hours. Some devices break them, and the sign of the current is the driver's: what comes out is held against what a
device can take. A battery that is charged, or of which nothing says that it is not, tells nothing of what is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from runtime_bench.conditions.meters.meter import (
    Counter,
    Facts,
    Meter,
    Source,
    Track,
    beside,
    counting,
    multiplied,
    showing,
    step_of,
)

_FOLDER = "/sys/class/power_supply/"
_INPUTS = ("Mains", "USB")
_ANDROIDS = "battery"
"""What Android's battery is called; gauges of the same one may stand beside it."""
_MICRO, _HOUR_S = 1e-6, 3600.0
MOST_W, LEAST_W = 250.0, 0.05
"""What a device with a battery takes at most, and what it takes at least while it computes."""


def _power(kind: str, domain: str, files: Mapping[str, Track]) -> Meter | None:
    return (
        showing(f"{kind} power", domain, files["power_now"], _MICRO, MOST_W) if "power_now" in files else None
    )


def _current(kind: str, domain: str, files: Mapping[str, Track]) -> Meter | None:
    if not {"voltage_now", "current_now"} <= files.keys():
        return None
    tracks = files["voltage_now"], files["current_now"]
    return multiplied(f"{kind} voltage x current", domain, *tracks, _MICRO * _MICRO, MOST_W)


def _energy(kind: str, domain: str, files: Mapping[str, Track]) -> Meter | None:
    if "energy_now" not in files:
        return None
    counter = Counter(_MICRO * _HOUR_S, MOST_W, falls=True)
    return counting(f"{kind} energy counter", domain, files["energy_now"], counter)


def _charge(kind: str, domain: str, files: Mapping[str, Track]) -> Meter | None:
    charge = files.get("charge_counter") or files.get("charge_now")
    if not charge or "voltage_now" not in files:
        return None
    return charge_meter(f"{kind} charge counter x voltage", domain, charge, files["voltage_now"], _MICRO)


def charge_meter(method: str, domain: str, charge: Track, voltage: Track, volt: float) -> Meter:
    """A meter that counts microampere hours down, each at the voltage that was shown then."""
    rounds = beside(charge, voltage)
    left, total = [], 0.0
    for i, (reading, volts) in enumerate(rounds):
        before, volts_before = rounds[i - 1] if i else (reading, volts)
        total += (reading.value - before.value) * (volts + volts_before) / 2 * volt
        left.append(reading._replace(value=total))
    mean = sum(volts for _, volts in rounds) / max(len(rounds), 1) * volt
    counter = Counter(_MICRO * _HOUR_S, MOST_W, falls=True)
    return counting(method, domain, tuple(left), counter, step_of(charge) * mean)


_OF_INPUT, _OF_BATTERY = (_power, _current), (_power, _current, _energy, _charge)
"""The finest first."""


def _meters(facts: Facts, tracks: Mapping[str, Track]) -> Sequence[Meter]:
    kinds, scopes = _said(facts, "type"), _said(facts, "scope")
    own = {name: kind for name, kind in kinds.items() if scopes.get(name) != "Device"}
    batteries = [name for name, kind in own.items() if kind == "Battery"]
    batteries = [_ANDROIDS] if _ANDROIDS in batteries else batteries
    files = {name: _files_of(name, tracks) for name in own}
    if not batteries:
        inputs = [name for name, kind in own.items() if kind in _INPUTS]
        made = [way("supply", f"input at {name}", files[name]) for way in _OF_INPUT for name in inputs]
        return [one for one in made if one]
    several = "the device has several batteries" if len(batteries) > 1 else ""
    made = [
        way("battery", f"whole device, at {name}", files[name]) for name in batteries for way in _OF_BATTERY
    ]
    return [
        replace(one, on_battery=True, least_w=LEAST_W, problem=one.problem or several) for one in made if one
    ]


def _said(facts: Facts, file: str) -> dict[str, str]:
    """A fact of each supply, by the supply's name."""
    found = ((re.fullmatch(rf"{_FOLDER}([^/]+)/{file}", path), text) for path, text in facts.items())
    return {match[1]: text.strip() for match, text in found if match}


def _files_of(name: str, tracks: Mapping[str, Track]) -> dict[str, Track]:
    folder = f"{_FOLDER}{name}/"
    return {path.removeprefix(folder): track for path, track in tracks.items() if path.startswith(folder)}


SUPPLY = Source(
    "power supply",
    "\n".join(
        f'meter "$base"{_FOLDER}*/{file}'
        for file in ("power_now", "voltage_now", "current_now", "energy_now", "charge_counter", "charge_now")
    ),
    _meters,
    (f"{_FOLDER}*/type", f"{_FOLDER}*/scope"),
)
