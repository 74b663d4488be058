"""What Android's services answer, read with tolerance: vendors add lines, leave some out, and number things anew.

Every reader takes an answer's text and gives a `Reading`. A form that is not known is no reading, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, TypeVar

T = TypeVar("T", covariant=True)
THERMAL_STATUSES = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
"""PowerManager.THERMAL_STATUS_*, by number."""
COLDEST_C, HOTTEST_C = -40.0, 150.0
"""Sensors that are not connected report values far outside."""

_NAME = re.compile(r"[A-Za-z][\w .]*", re.ASCII)
_TRUTH = MappingProxyType({"true": True, "false": False})
_SWITCH = MappingProxyType({"1": True, "0": False, "null": False})
"""Of the settings: one that was never set is off, as the system itself takes it."""
_SCREEN = MappingProxyType(
    {"on": True, "vr": True, "off": False, "doze": False, "doze_suspend": False, "on_suspend": True}
)
_WAKEFULNESS = MappingProxyType({"awake": True, "dreaming": True, "asleep": False, "dozing": False})
_CHARGING, _NOT_CHARGING = ("2",), ("3", "4")
"""BatteryManager.BATTERY_STATUS_*: charging; discharging, not charging. Unknown (1) and full (5) tell nothing of it."""


@dataclass(frozen=True)
class Reading(Generic[T]):
    """One value, or why there is none."""

    value: T | None
    why: str = ""


Reader = Callable[[str], Reading[T]]


def battery_percent(text: str) -> Reading[float]:
    """Charge, from `dumpsys battery`."""
    facts = _facts(text)
    if why := _stopped(text):
        return Reading(None, why)
    if facts.get("present") == "false":
        return Reading(None, "there is no battery")
    level, scale = (_whole(facts.get(name, "")) for name in ("level", "scale"))
    scale = 100 if "scale" not in facts else scale
    if level is None or not scale or level > scale:
        return Reading(None, "dumpsys battery states no level")
    return Reading(100.0 * level / scale)


def charging(text: str) -> Reading[bool]:
    """Whether power comes from outside, from `dumpsys battery`."""
    facts = _facts(text)
    if why := _stopped(text):
        return Reading(None, why)
    sources = [_TRUTH.get(value) for name, value in facts.items() if name.endswith("powered")]
    if not sources or None in sources:
        return Reading(None, "dumpsys battery does not say what powers the device")
    powered, status = any(sources), facts.get("status", "")
    if status in (_NOT_CHARGING[:1] if powered else _CHARGING):
        return Reading(None, f"dumpsys battery contradicts itself: status {status}, powered {powered}")
    return Reading(powered)


def thermal_status(text: str) -> Reading[int]:
    """Index in THERMAL_STATUSES, from `dumpsys thermalservice`."""
    facts = _facts(text)
    status = _whole(facts.get("thermal status", ""))
    if facts.get("isstatusoverride") == "true":
        return Reading(None, "the thermal status was set by hand")
    if facts.get("hal ready") == "false":
        return Reading(None, "the thermal service has no driver")
    if status is None or status >= len(THERMAL_STATUSES):
        return Reading(None, "dumpsys thermalservice states no thermal status")
    return Reading(status)


def hottest_c(text: str) -> Reading[float]:
    """Hottest of the temperatures that the driver gives just then, from `dumpsys thermalservice`."""
    current = text.partition("Current temperatures from HAL")[2]
    current = re.split(r"^\S.*cooling devices", current, maxsplit=1, flags=re.MULTILINE)[0]
    values = [
        float(number)
        for number in re.findall(r"Temperature\{[^{}]*?mValue=(-?\d{1,6}(?:\.\d{1,9})?),", current, re.ASCII)
    ]
    known = [value for value in values if COLDEST_C < value < HOTTEST_C]
    if not known:
        return Reading(None, "dumpsys thermalservice gives no temperature")
    return Reading(max(known))


def screen_on(text: str) -> Reading[bool]:
    """Whether the screen shows something, from `dumpsys power`."""
    found = re.search(r"Display Power:[^\n]*?\bstate=(\w+)", text, re.ASCII)
    facts = _facts(text)
    told = (
        _SCREEN.get(found[1].lower()) if found else None,
        _WAKEFULNESS.get(facts.get("mwakefulness", "")),
        _TRUTH.get(facts.get("mscreenon", "")),
    )
    value = next((one for one in told if one is not None), None)
    return Reading(value, "" if value is not None else "dumpsys power does not tell of the screen")


def low_power(text: str) -> Reading[bool]:
    """Whether the battery saver is on, from `settings get global low_power`."""
    value = _SWITCH.get(text.strip())
    return Reading(value, "" if value is not None else "the setting low_power has no known value")


def saver(text: str) -> Reading[bool]:
    """Whether the battery saver is on, from `dumpsys power`."""
    facts = _facts(text)
    told = (
        _TRUTH.get(facts.get(name, "")) for name in ("mlowpowermodeenabled", "msettingbatterysaverenabled")
    )
    value = next((one for one in told if one is not None), None)
    return Reading(value, "" if value is not None else "dumpsys power does not tell of a battery saver")


def _facts(text: str) -> Mapping[str, str]:
    """`name: value` and `name=value` of whole lines, in lower case; of several of a name the first, which is the
    service's own: what vendors append comes later."""
    facts: dict[str, str] = {}
    for line in text.split("\n"):
        name, *value = (part.strip().lower() for part in re.split("[:=]", line, maxsplit=1))
        if value and _NAME.fullmatch(name):
            facts.setdefault(name, value[0])
    return facts


def _stopped(text: str) -> str:
    return "the battery's figures were set by hand" if "UPDATES STOPPED" in text else ""


def _whole(text: str, digits: int = 6) -> int | None:
    return int(text) if re.fullmatch(rf"\d{{1,{digits}}}", text, re.ASCII) else None
