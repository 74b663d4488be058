"""What a machine went through while one process measured on it.

A series has a value for each look, None where that look did not tell. A series that no look told is empty, and
`hidden` says why.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, fields, replace
from typing import Any

INTERVAL_S = 0.5
"""From one look to the next."""


@dataclass(frozen=True)
class Conditions:
    """A process's surroundings, look by look."""

    # When each look was taken, seconds since the first one, which was taken when the process began
    at_s: tuple[float, ...] = ()
    # When each timed sample began and ended, by the same clock; empty where the process does not tell
    samples_s: tuple[tuple[float, float], ...] = ()
    # Least share of its highest clock that any core of the run was allowed
    caps: tuple[float | None, ...] = ()
    clocks: tuple[float | None, ...] = ()  # Highest share of its highest clock that any core of the run had
    hottest_c: tuple[float | None, ...] = ()  # Hottest thermal zone, degrees Celsius
    thermal_status: tuple[int | None, ...] = ()  # Android's, 0 (none) to 6 (shutdown)
    battery_percent: tuple[float | None, ...] = ()  # Charge of the battery
    charging: tuple[bool | None, ...] = ()  # Whether power came from outside
    low_power: tuple[bool | None, ...] = ()  # Whether the system was told to save power
    screen_on: tuple[bool | None, ...] = ()  # Whether the screen was on
    free_bytes: tuple[int | None, ...] = ()  # Memory that a process could have got
    others_cores: tuple[float | None, ...] = ()  # Cores that other programs used since the look before
    # Cores that the host of a virtual machine took away since the look before
    stolen_cores: tuple[float | None, ...] = ()
    # Share of the time since the look before in which a quota kept the process's group from running
    held_share: tuple[float | None, ...] = ()
    hidden: dict[str, str] = field(default_factory=dict)  # Series -> why no look told it

    def told(self, name: str) -> list[tuple[float, Any]]:
        """(seconds, value) of a series wherever it was told while samples were timed.

        The last value before a sample and the first one after it count, too: what lies between two looks is known from
        both.
        """
        told = [(at, v) for at, v in zip(self.at_s, getattr(self, name), strict=False) if v is not None]
        if not self.samples_s:
            return told
        times = [at for at, _ in told]
        spans = zip(times[:1] + times[:-1], times[1:] + times[-1:], strict=True)
        ended = [end for _, end in self.samples_s]  # one sample follows the other
        return [
            one
            for one, (before, after) in zip(told, spans, strict=True)
            if (place := bisect_left(ended, before)) < len(ended) and self.samples_s[place][0] <= after
        ]

    def hiding(self, name: str, why: str) -> Conditions:
        """The same without a series."""
        return replace(self, **{name: ()}, hidden=self.hidden | {name: why})


SERIES = tuple(f.name for f in fields(Conditions) if f.name not in ("at_s", "samples_s", "hidden"))
"""Names of what is told look by look."""


def nothing_known(why: str) -> Conditions:
    """Conditions of which nothing is known, for one reason."""
    return Conditions(hidden=dict.fromkeys(SERIES, why))
