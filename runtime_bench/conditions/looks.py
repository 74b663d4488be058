"""A machine's conditions and energy during samples, from the text of `runtime_bench.conditions.script`.

What Android's services answer is read with tolerance: vendors add lines, leave some out, and number things anew. A form
that is not known is no reading, with the reason.

Energy has two sources: RAPL counters of Intel's and AMD's processors (reads need root since Linux 5.10, CVE-2020-8694),
and the battery's power, or its current times voltage, while there is no external power. A reading is known at the
moment at which it changed. Between two changes a counter says how much there was but not when, and a sensor that power
was between both of its values: that gives the bounds.
"""

from __future__ import annotations

import re
import subprocess
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

from runtime_bench.conditions.script import (
    ASKED,
    FACT,
    METERS,
    NOT_LINUX,
    READING,
    SAMPLE_BEGINS,
    SHELL,
    UNREADABLE,
)
from runtime_bench.counters import BUSY, STEAL
from runtime_bench.records.reported import (
    SERIES,
    Conditions,
    Joules,
    Metered,
    ProcessEnergy,
    unknown_conditions,
)

_OF_FILE = re.compile(r"(/(?:[^:]|:(?=\S*/))*):(.*)")
"""A line of a file: its path, in which the name of a power supply may have a colon, and its text."""
_HZ = 100
"""Ticks a second of times in /proc, on every Linux that runs programs of today."""
_MOST_LOOKS = 9000
"""What a record holds; of more, one is taken for several."""
_FAR_S = 5.0
"""Samples that begin or end so long before the first look or after the last one are by another clock."""
_LOOK_S = 60.0
_COLDEST_C, _HOTTEST_C = -40.0, 150.0
"""Sensors that are not connected report values far outside."""
_THERMAL_STATUSES = 7
"""PowerManager.THERMAL_STATUS_*: none, light, moderate, severe, critical, emergency, shutdown."""
_NAME = re.compile(r"[A-Za-z][\w .]*", re.ASCII)
_TRUTH = MappingProxyType({"true": True, "false": False})
_PROFILES = MappingProxyType(
    {"low-power": True, "balanced": False, "performance": False, "balanced-performance": False}
)
_SWITCH = MappingProxyType({"1": True, "0": False, "null": False})
"""Of Android's settings: one that was never set is off, as the system itself takes it."""
_SCREEN = MappingProxyType(
    {"on": True, "vr": True, "off": False, "doze": False, "doze_suspend": False, "on_suspend": True}
)
_WAKEFULNESS = MappingProxyType({"awake": True, "dreaming": True, "asleep": False, "dozing": False})
_CHARGING, _DISCHARGING = "2", "3"
"""BatteryManager.BATTERY_STATUS_*. Unknown (1), not charging (4) and full (5) tell nothing of external power."""


class Reading(NamedTuple):
    """One value, or why there is none."""

    value: Any
    why: str = ""


class Look(NamedTuple):
    """One look."""

    files: Mapping[str, str] = MappingProxyType({})  # Path -> text
    answers: Mapping[str, str] = MappingProxyType({})  # Name of a question to a service -> its answer

    def numbers(self, pattern: str) -> dict[str, int]:
        """Of files whose paths match, the number that each holds, by the pattern's group."""
        found = ((re.fullmatch(pattern, path), text.strip()) for path, text in self.files.items())
        return {m[1]: int(text) for m, text in found if m and re.fullmatch(r"-?\d{1,18}", text, re.ASCII)}


def look_here() -> Conditions:
    """One look at this machine."""
    try:
        output = subprocess.run([*SHELL, ""], capture_output=True, check=False, timeout=_LOOK_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return unknown_conditions(NOT_LINUX)
    return conditions_of(output.decode("utf-8", "replace"))


def conditions_of(text: str, spans_ns: Sequence[tuple[int, int]] = (), why: str = "") -> Conditions:
    """The conditions that a script's output tells.

    Args:
        text: The output, possibly torn at the end.
        spans_ns: Begin and end of each timed sample, nanoseconds since boot.
        why: Why there is no output.
    """
    once, *parts = map(_parse, re.split(rf"^{SAMPLE_BEGINS}$\n?", text, flags=re.MULTILINE))
    timed = []
    for part in parts:  # each has what is there once, too
        look = Look({**once.files, **part.files}, part.answers)
        found = re.match(r"(\d{1,12}(?:\.\d+)?)(?:\s|$)", look.files.get("/proc/uptime", ""), re.ASCII)
        if found:
            timed.append((float(found[1]), look))
    timed = timed[:: 1 + len(timed) // _MOST_LOOKS]
    if not timed:
        return unknown_conditions(why or NOT_LINUX)
    series, hidden = dict[str, tuple[Any, ...]](), dict[str, str]()
    for name in SERIES:
        if name in _READERS:
            readings = [_READERS[name](look) for _, look in timed]
        else:
            readings = [Reading(None, "there was one look alone" if len(timed) < 2 else "")]
            readings += [
                _CHANGES[name](before, look, end - begin)
                if end > begin
                else Reading(None, "no time had passed")
                for (begin, before), (end, look) in pairwise(timed)
            ]
        if any(one.value is not None for one in readings):
            series[name] = tuple(one.value for one in readings)
        else:
            hidden[name] = next((one.why for one in readings if one.why), "no look told it")
    first, last = timed[0][0], timed[-1][0]
    spans = [(begin / 1e9 - first, end / 1e9 - first) for begin, end in spans_ns]
    near = all(begin > -_FAR_S and end < last - first + _FAR_S for begin, end in spans)
    samples = tuple((round(begin, 3), round(end, 3)) for begin, end in spans) if near else ()
    return Conditions(tuple(round(at - first, 2) for at, _ in timed), samples, **series, hidden=hidden)


def _parse(text: str) -> Look:
    files: dict[str, list[str]] = {}
    answers: dict[str, list[str]] = {}
    for line in text.splitlines():
        if named := _OF_FILE.fullmatch(line):
            files.setdefault(named[1], []).append(named[2])
            continue
        name, colon, content = line.partition(":")
        if colon and line.startswith(ASKED):
            answers.setdefault(name.removeprefix(ASKED), []).append(content)
    joined = ({key: "\n".join(lines) for key, lines in one.items()} for one in (files, answers))
    return Look(*joined)


def _first(*readings: Reading) -> Reading:
    """The first that has a value."""
    whys = "; ".join(dict.fromkeys(one.why for one in readings if one.why))
    return next((one for one in readings if one.value is not None), Reading(None, whys))


def _service(look: Look, name: str, read: Callable[[str, Mapping[str, str]], Reading]) -> Reading:
    """What an Android service's answer tells: of its text, and of its lines `name: value` and `name=value`, in lower
    case, of several of a name the first: what vendors append comes later."""
    if name not in look.answers:
        return Reading(None, "no service of this system tells it")
    text, facts = look.answers[name], dict[str, str]()
    for line in text.split("\n"):
        key, *value = (part.strip().lower() for part in re.split("[:=]", line, maxsplit=1))
        if value and _NAME.fullmatch(key):
            facts.setdefault(key, value[0])
    return read(text, facts)


def _clock(look: Look, name: str, extreme: Callable[[list[float]], float], what: str) -> Reading:
    """A frequency's share of the core's highest one, of the cores that the process may use."""
    folder = r"/sys/devices/system/cpu/cpu(\d+)/cpufreq/"
    now, most = look.numbers(folder + name), look.numbers(folder + "cpuinfo_max_freq")
    statuses = (text for path, text in look.files.items() if re.fullmatch(r"/proc/.*/status", path))
    found = re.search(r"Cpus_allowed_list:\s*([\d,-]+)", next(statuses, ""), re.ASCII)
    cores = set(now) & {core for core, khz in most.items() if khz > 0}
    if found:
        allowed = set()
        for part in found[1].split(","):
            if bounds := re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part, re.ASCII):
                allowed |= {str(core) for core in range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1)}
        cores &= allowed
    shares = [now[core] / most[core] for core in cores if now[core] >= 0]
    return Reading(round(extreme(shares), 4)) if shares else Reading(None, f"no file shows {what}")


def _hottest(look: Look) -> Reading:
    def read(text: str, _: Mapping[str, str]) -> Reading:
        current = text.partition("Current temperatures from HAL")[2]
        current = re.split(r"^\S.*cooling devices", current, maxsplit=1, flags=re.MULTILINE)[0]
        pattern = r"Temperature\{[^{}]*?mValue=(-?\d{1,6}(?:\.\d{1,9})?),"
        return hottest(
            map(float, re.findall(pattern, current, re.ASCII)), "dumpsys thermalservice gives no temperature"
        )

    def hottest(degrees: Any, why: str) -> Reading:
        known = [value for value in degrees if _COLDEST_C < value < _HOTTEST_C]
        return Reading(max(known)) if known else Reading(None, why)

    zones = look.numbers(r"/sys/class/thermal/(thermal_zone\d+)/temp").values()
    here = hottest((milli / 1000 for milli in zones), "no file shows a temperature")
    return _first(here, _service(look, "thermal", read))


def _thermal_status(look: Look) -> Reading:
    def read(text: str, facts: Mapping[str, str]) -> Reading:
        status = facts.get("thermal status", "")
        if facts.get("isstatusoverride") == "true":
            return Reading(None, "the thermal status was set by hand")
        if facts.get("hal ready") == "false":
            return Reading(None, "the thermal service has no driver")
        if not re.fullmatch(r"\d{1,6}", status, re.ASCII) or int(status) >= _THERMAL_STATUSES:
            return Reading(None, "dumpsys thermalservice states no thermal status")
        return Reading(int(status))

    return _service(look, "thermal", read)


def _charging(look: Look) -> Reading:
    """Whether there is external power."""

    def read(text: str, facts: Mapping[str, str]) -> Reading:
        if "UPDATES STOPPED" in text:
            return Reading(None, "the battery's figures were set by hand")
        sources = [_TRUTH.get(value) for name, value in facts.items() if name.endswith("powered")]
        if not sources or None in sources:
            return Reading(None, "dumpsys battery does not say what powers the device")
        powered, status = any(sources), facts.get("status", "")
        if status == (_DISCHARGING if powered else _CHARGING):
            return Reading(None, f"dumpsys battery contradicts itself: status {status}, powered {powered}")
        return Reading(powered)

    supplies: dict[str, dict[str, str]] = {}
    for path in look.files:
        if path.startswith("/sys/class/power_supply/"):
            one = PurePosixPath(path)
            supplies.setdefault(str(one.parent), {})[one.name] = look.files[path].strip()
    # Of the machine itself, not of a mouse on it
    own = [one for one in supplies.values() if one.get("scope") != "Device" and "type" in one]
    sources = {one["online"] for one in own if one["type"] != "Battery" and "online" in one}
    states = {one.get("status") for one in own if one["type"] == "Battery"}
    powered, drained = "1" in sources or "Charging" in states, states == {"Discharging"}
    if powered and drained:
        here = Reading(None, "the power supplies contradict each other")
    elif powered or drained or (states and sources == {"0"}):
        here = Reading(powered)
    else:
        here = Reading(None, "no file shows whether a battery is charged")
    return _first(here, _service(look, "battery", read))


def _low_power(look: Look) -> Reading:
    def known(values: Sequence[bool | None], why: str) -> Reading:
        value = next((one for one in values if one is not None), None)
        return Reading(value, "" if value is not None else why)

    def saver(text: str, facts: Mapping[str, str]) -> Reading:
        names = ("mlowpowermodeenabled", "msettingbatterysaverenabled")
        values = [_TRUTH.get(facts.get(name, "")) for name in names]
        return known(values, "dumpsys power does not tell of a battery saver")

    profile = look.files.get("/sys/firmware/acpi/platform_profile", "").strip()
    return _first(
        known([_PROFILES.get(profile)], "no file shows whether power is saved"),
        _service(
            look,
            "low_power",
            lambda text, _: known([_SWITCH.get(text.strip())], "the setting low_power has no known value"),
        ),
        _service(look, "power", saver),
    )


def _screen_on(look: Look) -> Reading:
    def read(text: str, facts: Mapping[str, str]) -> Reading:
        found = re.search(r"Display Power:[^\n]*?\bstate=(\w+)", text, re.ASCII)
        told = (
            _SCREEN.get(found[1].lower()) if found else None,
            _WAKEFULNESS.get(facts.get("mwakefulness", "")),
            _TRUTH.get(facts.get("mscreenon", "")),
        )
        value = next((one for one in told if one is not None), None)
        return Reading(value, "" if value is not None else "dumpsys power does not tell of the screen")

    return _service(look, "power", read)


_READERS: Mapping[str, Callable[[Look], Reading]] = MappingProxyType(
    {
        "caps": lambda look: _clock(look, "scaling_max_freq", min, "caps of the clocks"),
        "clocks": lambda look: _clock(look, "scaling_cur_freq", max, "the clocks"),
        "hottest_c": _hottest,
        "thermal_status": _thermal_status,
        "charging": _charging,
        "low_power": _low_power,
        "screen_on": _screen_on,
    }
)
"""How each series is read of a look."""


def _numbers(words: Sequence[str]) -> list[int]:
    """Empty unless all are numbers."""
    return list(map(int, words)) if all(re.fullmatch(r"\d{1,18}", w, re.ASCII) for w in words) else []


def _cpu_times(look: Look) -> list[int]:
    """Ticks of all cores by what they did; empty if /proc/stat may not be read."""
    words = look.files.get("/proc/stat", "").split()[:9]
    return _numbers(words[1:]) if words[:1] == ["cpu"] and len(words) == 9 else []


def _others(before: Look, look: Look, seconds: float) -> Reading:
    """Cores that other programs used."""

    def own(look: Look) -> list[int]:
        """Ticks of the process and of its children that have ended."""
        text = next((text for path, text in look.files.items() if re.fullmatch(r"/proc/\d+/stat", path)), "")
        words = text.rpartition(")")[2].split()[11:15]
        return _numbers(words) if len(words) == 4 else []

    times, owns = (_cpu_times(before), _cpu_times(look)), (own(before), own(look))
    if not all(times):
        return Reading(None, "/proc/stat may not be read")
    if not all(owns):
        return Reading(None, "the process has ended, or may not be seen")
    busy, used = sum(times[1][i] - times[0][i] for i in BUSY), sum(owns[1]) - sum(owns[0])
    if busy < used / 2:
        return Reading(None, "/proc/stat does not count what runs")
    return Reading(round(max(0, busy - used) / _HZ / seconds, 3))


def _stolen(before: Look, look: Look, seconds: float) -> Reading:
    """Cores that a hypervisor took."""
    times = _cpu_times(before), _cpu_times(look)
    if not all(times):
        return Reading(None, "/proc/stat may not be read")
    return Reading(round(max(0, times[1][STEAL] - times[0][STEAL]) / _HZ / seconds, 3))


def _held(before: Look, look: Look, seconds: float) -> Reading:
    """Share of the time in which a quota stopped one of the process's groups."""

    def held_s(look: Look) -> dict[str, float]:
        held = {}
        for path, text in look.files.items():
            found = re.search(r"^throttled_(time|usec) (\d{1,20})$", text, re.MULTILINE | re.ASCII)
            if path.endswith("/cpu.stat") and found:
                held[path] = int(found[2]) / (1e9 if found[1] == "time" else 1e6)
        return held

    then, now = held_s(before), held_s(look)
    counted = [now[path] - then[path] for path in now if path in then]
    if not counted:
        return Reading(None, "no group counts how long quotas held it")
    return Reading(round(min(1.0, max(0.0, *counted, 0.0) / seconds), 3))


_CHANGES: Mapping[str, Callable[[Look, Look, float], Reading]] = MappingProxyType(
    {"others_cores": _others, "stolen_cores": _stolen, "held_share": _held}
)
"""How each series is read that tells what has changed since the look before, so many seconds ago."""


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
