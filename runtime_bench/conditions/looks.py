"""Looks at a machine, from the text of `runtime_bench.conditions.script`, and the conditions that they make up."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

from runtime_bench.conditions import android
from runtime_bench.conditions.android import COLDEST_C, HOTTEST_C, Reader, Reading
from runtime_bench.conditions.script import ASKED, SAMPLE_BEGINS
from runtime_bench.counters import BUSY, STEAL
from runtime_bench.records.reported import SERIES, Conditions, unknown_conditions

NOT_LINUX = "this system has no /proc"
_OF_FILE = re.compile(r"(/(?:[^:]|:(?=\S*/))*):(.*)")
"""A line of a file: its path, in which the name of a power supply may have a colon, and its text."""
_HZ = 100
"""Ticks a second of times in /proc, on every Linux that runs programs of today."""
_MOST_LOOKS = 9000
"""What a record holds; of more, one is taken for several."""
_FAR_S = 5.0
"""Samples that begin or end so long before the first look or after the last one are by another clock."""


@dataclass(frozen=True)
class Look:
    """One look."""

    files: Mapping[str, str] = field(default_factory=dict)  # Path -> text
    answers: Mapping[str, str] = field(default_factory=dict)  # Name of a question to a service -> its answer

    def numbers(self, pattern: str) -> dict[str, int]:
        """Of files whose paths match, the number that each holds, by the pattern's group."""
        found = ((re.fullmatch(pattern, path), text.strip()) for path, text in self.files.items())
        return {m[1]: int(text) for m, text in found if m and re.fullmatch(r"-?\d{1,18}", text, re.ASCII)}


def parse_looks(text: str) -> list[Look]:
    """Looks in the order taken; each has what is there once, too."""
    once, *parts = re.split(rf"^{SAMPLE_BEGINS}$\n?", text, flags=re.MULTILINE)
    constant = _parse(once)
    return [Look({**constant.files, **part.files}, part.answers) for part in map(_parse, parts)]


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


def conditions_of(text: str, spans_ns: Sequence[tuple[int, int]] = (), why: str = "") -> Conditions:
    """The conditions that a script's output tells."""
    timed = [(seconds, look) for look in parse_looks(text) if (seconds := _uptime(look)) is not None]
    timed = timed[:: 1 + len(timed) // _MOST_LOOKS]
    if not timed:
        return unknown_conditions(why or NOT_LINUX)
    at = [seconds for seconds, _ in timed]
    looks = [look for _, look in timed]
    read = {name: list(_SERIES[name](looks, at)) for name in SERIES}
    series = {name: _values(readings) for name, readings in read.items()}
    hidden = {
        name: next((one.why for one in readings if one.why), "no look told it")
        for name, readings in read.items()
        if not series[name]
    }
    return Conditions(tuple(round(s - at[0], 2) for s in at), _spans_s(spans_ns, at), **series, hidden=hidden)


def _values(readings: Sequence[Reading[Any]]) -> tuple[Any, ...]:
    """The values of a series; none where no look told one."""
    values = tuple(reading.value for reading in readings)
    return values if any(value is not None for value in values) else ()


def _spans_s(spans_ns: Sequence[tuple[int, int]], at: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """When each sample began and ended, seconds after the first look; none where another clock was read."""
    shifted = [(begin / 1e9 - at[0], end / 1e9 - at[0]) for begin, end in spans_ns]
    near = all(begin > -_FAR_S and end < at[-1] - at[0] + _FAR_S for begin, end in shifted)
    return tuple((round(begin, 3), round(end, 3)) for begin, end in shifted) if near else ()


_Series = Callable[[Sequence[Look], Sequence[float]], Iterable[Reading[Any]]]


def _each(*readers: Callable[[Look], Reading[Any]]) -> _Series:
    """A series that each look tells by itself: by the first of some readers that finds a value."""

    def read(look: Look) -> Reading[Any]:
        tried = [reader(look) for reader in readers]
        whys = "; ".join(dict.fromkeys(one.why for one in tried if one.why))
        return next((one for one in tried if one.value is not None), Reading(None, whys))

    return lambda looks, at: map(read, looks)


def _change(read: Callable[[Look, Look, float], Reading[Any]]) -> _Series:
    """A series that tells what has changed since the look before."""

    def series(looks: Sequence[Look], at: Sequence[float]) -> Iterable[Reading[Any]]:
        yield Reading(None, "there was one look alone" if len(looks) < 2 else "")
        for i in range(1, len(looks)):
            seconds = at[i] - at[i - 1]
            yield (
                read(looks[i - 1], looks[i], seconds) if seconds > 0 else Reading(None, "no time had passed")
            )

    return series


def _answer(name: str, reader: Reader[Any]) -> Callable[[Look], Reading[Any]]:
    """What a service answered."""
    none = Reading[Any](None, "no service of this system tells it")
    return lambda look: reader(look.answers[name]) if name in look.answers else none


def _uptime(look: Look) -> float | None:
    found = re.match(r"(\d{1,12}(?:\.\d+)?)(?:\s|$)", look.files.get("/proc/uptime", ""), re.ASCII)
    return float(found[1]) if found else None


def _cores(look: Look) -> set[str] | None:
    """The cores that the process may use; None where that is not known."""
    lists = [
        text for path, text in look.files.items() if path.endswith("/status") and path.startswith("/proc/")
    ]
    found = re.search(r"Cpus_allowed_list:\s*([\d,-]+)", lists[0], re.ASCII) if lists else None
    if not found:
        return None
    cores: set[str] = set()
    for part in found[1].split(","):
        if bounds := re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part, re.ASCII):
            cores |= {str(core) for core in range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1)}
    return cores


def _clock_shares(look: Look, name: str) -> list[float]:
    folder = r"/sys/devices/system/cpu/cpu(\d+)/cpufreq/"
    now, most = look.numbers(folder + name), look.numbers(folder + "cpuinfo_max_freq")
    allowed = _cores(look)
    cores = [core for core in now if core in most and (allowed is None or core in allowed)]
    return [now[core] / most[core] for core in cores if most[core] > 0 and now[core] >= 0]


def _caps(look: Look) -> Reading[float]:
    shares = _clock_shares(look, "scaling_max_freq")
    return Reading(round(min(shares), 4)) if shares else Reading(None, "no file shows caps of the clocks")


def _clocks(look: Look) -> Reading[float]:
    shares = _clock_shares(look, "scaling_cur_freq")
    return Reading(round(max(shares), 4)) if shares else Reading(None, "no file shows the clocks")


def _zones(look: Look) -> Reading[float]:
    zones = look.numbers(r"/sys/class/thermal/(thermal_zone\d+)/temp").values()
    known = [milli / 1000 for milli in zones if COLDEST_C < milli / 1000 < HOTTEST_C]
    return Reading(max(known)) if known else Reading(None, "no file shows a temperature")


def _supplies(look: Look, name: str) -> dict[str, str]:
    """A file of each power supply of the machine itself, not of a mouse on it: folder -> text."""
    paths = [PurePosixPath(path) for path in look.files if path.startswith("/sys/class/power_supply/")]
    texts = {(str(path.parent), path.name): look.files[str(path)].strip() for path in paths}
    return {
        folder: text
        for (folder, file), text in texts.items()
        if file == name and texts.get((folder, "scope")) != "Device"
    }


def _batteries(look: Look) -> set[str]:
    return {folder for folder, kind in _supplies(look, "type").items() if kind == "Battery"}


def _battery_percent(look: Look) -> Reading[float]:
    capacities = _supplies(look, "capacity")
    values = [capacities[one] for one in _batteries(look) if one in capacities]
    known = [int(text) for text in values if re.fullmatch(r"\d{1,3}", text, re.ASCII)]
    if len(known) != 1 or known[0] > 100:
        return Reading(None, "no file shows one battery's charge")
    return Reading(float(known[0]))


def _charging(look: Look) -> Reading[bool]:
    kinds, online, status = (_supplies(look, name) for name in ("type", "online", "status"))
    sources = [online[one] for one in kinds if kinds[one] != "Battery" and one in online]
    states = {status.get(one) for one in _batteries(look)}
    powered, drained = "1" in sources or "Charging" in states, states == {"Discharging"}
    if powered and drained:
        return Reading(None, "the power supplies contradict each other")
    if powered or drained or (states and set(sources) == {"0"}):
        return Reading(powered)
    return Reading(None, "no file shows whether a battery is charged")


def _profile(look: Look) -> Reading[bool]:
    profile = look.files.get("/sys/firmware/acpi/platform_profile", "").strip()
    known = {"low-power": True, "balanced": False, "performance": False, "balanced-performance": False}
    return Reading(known.get(profile), "" if profile in known else "no file shows whether power is saved")


def _free(look: Look) -> Reading[int]:
    found = re.match(r"MemAvailable:\s+(\d{1,15}) kB", look.files.get("/proc/meminfo", ""), re.ASCII)
    return Reading(int(found[1]) * 1024) if found else Reading(None, "/proc/meminfo does not show it")


def _cpu_times(look: Look) -> list[int]:
    """Ticks of all cores by what they did; empty where /proc/stat may not be read."""
    words = look.files.get("/proc/stat", "").split()
    times = words[1:9]
    return [int(w) for w in times] if words[:1] == ["cpu"] and len(times) == 8 and _are_numbers(times) else []


def _own_times(look: Look) -> int | None:
    """Ticks of the process and of its children that have ended, of /proc/PID/stat."""
    text = next((text for path, text in look.files.items() if re.fullmatch(r"/proc/\d+/stat", path)), "")
    words = text.rpartition(")")[2].split()
    return sum(map(int, words[11:15])) if len(words) > 14 and _are_numbers(words[11:15]) else None


def _are_numbers(words: Sequence[str]) -> bool:
    return all(re.fullmatch(r"\d{1,18}", word, re.ASCII) for word in words)


def _others(before: Look, look: Look, seconds: float) -> Reading[float]:
    times, own = (_cpu_times(before), _cpu_times(look)), (_own_times(before), _own_times(look))
    if not all(times):
        return Reading(None, "/proc/stat may not be read")
    if own[0] is None or own[1] is None:
        return Reading(None, "the process has ended, or may not be seen")
    busy = sum(times[1][i] - times[0][i] for i in BUSY)
    if busy < (own[1] - own[0]) / 2:
        return Reading(None, "/proc/stat does not count what runs")
    return Reading(round(max(0, busy - (own[1] - own[0])) / _HZ / seconds, 3))


def _stolen(before: Look, look: Look, seconds: float) -> Reading[float]:
    times = _cpu_times(before), _cpu_times(look)
    if not all(times):
        return Reading(None, "/proc/stat may not be read")
    return Reading(round(max(0, times[1][STEAL] - times[0][STEAL]) / _HZ / seconds, 3))


def _held_s(look: Look) -> dict[str, float]:
    """Seconds until now that quotas kept each group of the process from running."""
    held = {}
    for path, text in look.files.items():
        found = re.search(r"^throttled_(time|usec) (\d{1,20})$", text, re.MULTILINE | re.ASCII)
        if path.endswith("/cpu.stat") and found:
            held[path] = int(found[2]) / (1e9 if found[1] == "time" else 1e6)
    return held


def _held(before: Look, look: Look, seconds: float) -> Reading[float]:
    then, now = _held_s(before), _held_s(look)
    counted = [now[path] - then[path] for path in now if path in then]
    if not counted:
        return Reading(None, "no group counts how long quotas held it")
    return Reading(round(min(1.0, max(0.0, *counted, 0.0) / seconds), 3))


_SERIES: MappingProxyType[str, _Series] = MappingProxyType(
    {
        "caps": _each(_caps),
        "clocks": _each(_clocks),
        "hottest_c": _each(_zones, _answer("thermal", android.hottest_c)),
        "thermal_status": _each(_answer("thermal", android.thermal_status)),
        "battery_percent": _each(_battery_percent, _answer("battery", android.battery_percent)),
        "charging": _each(_charging, _answer("battery", android.charging)),
        "low_power": _each(
            _profile, _answer("low_power", android.low_power), _answer("power", android.saver)
        ),
        "screen_on": _each(_answer("power", android.screen_on)),
        "free_bytes": _each(_free),
        "others_cores": _change(_others),
        "stolen_cores": _change(_stolen),
        "held_share": _change(_held),
    }
)
"""How each series is read."""
