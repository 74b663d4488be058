"""The energy of one process's samples, from the text of `runtime_bench.conditions.script`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from runtime_bench.conditions.looks import parse_looks
from runtime_bench.conditions.meters.joules import Change, changes, joules_in, update_s
from runtime_bench.conditions.meters.meter import Meter
from runtime_bench.conditions.meters.readings import answered, readings_of
from runtime_bench.conditions.meters.table import SOURCES
from runtime_bench.conditions.meters.windows import Windows
from runtime_bench.records.conditions import Conditions
from runtime_bench.records.energy import Metered, ProcessEnergy

MOST_METERS = 12
"""What a record holds of one process."""
_NONE = "nothing here meters energy: neither RAPL nor hwmon nor a power supply shows any"
_NO_TIMES = "what measures there does not say when its samples began, or by another clock"


def energy_of(text: str, spans_ns: Sequence[tuple[int, int]], seen: Conditions) -> ProcessEnergy:
    """What the meters told while the samples of a process were taken."""
    looks, readings = parse_looks(text), readings_of(text)
    tracks = {path: tuple(track) for path, track in readings.tracks.items()} | answered(looks)
    meters = list(chain.from_iterable(source.meters(readings.facts, tracks) for source in SOURCES.values()))
    hidden = _unreadable(list(readings.unreadable))
    if not meters:
        return ProcessEnergy(hidden=hidden or _NONE)
    if not seen.samples_s:
        return ProcessEnergy(hidden=_NO_TIMES)
    samples = Windows([(begin / 1e9, end / 1e9) for begin, end in spans_ns])
    idle = Windows([readings.idle] if readings.idle else [])
    told = tuple(_metered(meter, samples, idle, seen) for meter in meters[:MOST_METERS])
    return ProcessEnergy(told, hidden or None)


def _unreadable(paths: Sequence[str]) -> str:
    """Why what is there may not be read; empty where nothing is."""
    if not paths:
        return ""
    others = f", nor {len(paths) - 1} more" if len(paths) > 1 else ""
    root = (
        ": on most systems root alone may, unless an administrator lets others"
        if "powercap" in paths[0]
        else ""
    )
    return f"{paths[0]} may not be read{others}{root}"


def _metered(meter: Meter, samples: Windows, idle: Windows, seen: Conditions) -> Metered:
    moments = changes(meter)
    problem = meter.problem or _on_battery(meter, seen) or _unmoved(meter, moments)
    told = Metered(
        meter.method,
        meter.domain,
        meter.counts,
        round(samples.seconds, 6),
        idle_seconds=round(idle.seconds, 6),
        step=meter.step or None,
        update_s=update_s(moments),
        problem=problem or None,
    )
    if problem:
        return told
    joules = joules_in(meter, moments, samples)
    if joules.high < meter.least_w * samples.seconds:
        why = f"it showed {joules.value / samples.seconds:.2g} W of a device that computed: its unit is another one"
        return replace(told, problem=why)
    return replace(
        told, joules=joules, idle_joules=joules_in(meter, moments, idle) if idle.seconds > 0 else None
    )


def _on_battery(meter: Meter, seen: Conditions) -> str:
    """Why what leaves a battery is not what the device took."""
    if not meter.on_battery:
        return ""
    states = {charging for charging in seen.charging if charging is not None}
    if not states:
        return (
            f"whether power came from outside is not known: {seen.hidden.get('charging', 'no look told it')}"
        )
    if len(states) > 1:
        return "power from outside came or went"
    return (
        "power came from outside, and what leaves the battery is not what is used" if True in states else ""
    )


def _unmoved(meter: Meter, moments: Sequence[Change]) -> str:
    """Why too little was seen of a meter to say anything."""
    if len(meter.track) < 2:
        return "it was read less than twice"
    if len(moments) > 1:
        return ""
    seconds = meter.track[-1].answered_s - meter.track[0].asked_s
    changed = "changed once" if moments else "never changed"
    return f"its reading {changed} in {seconds:.1f} s: it is stuck, or too coarse for so short a run"
