"""What meters of energy told while one process measured.

A meter counts joules, or shows watts that are summed up over time. None sees a process alone: `domain` says what it
measures.
"""

from __future__ import annotations

from dataclasses import dataclass

GLANCE_S = 0.1
"""From one reading of the meters to the next."""


@dataclass(frozen=True)
class Joules:
    """An energy, joules, and what it lies between."""

    low: float  # It is not less
    value: float  # The best guess
    high: float  # It is not more

    def __add__(self, other: Joules) -> Joules:
        """The sum: errors add up, since they may have one cause."""
        return Joules(self.low + other.low, self.value + other.value, self.high + other.high)

    def __sub__(self, other: Joules) -> Joules:
        """The difference; each end is of the other's opposite one."""
        return Joules(self.low - other.high, self.value - other.value, self.high - other.low)

    def times(self, factor: float) -> Joules:
        """The same, multiplied by a factor that is not negative."""
        return Joules(self.low * factor, self.value * factor, self.high * factor)

    @property
    def error(self) -> float:
        """How far the truth may be from the value."""
        return max(self.high - self.value, self.value - self.low)


NOTHING = Joules(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Metered:
    """What one meter told of one process."""

    method: str  # How, such as `RAPL counter`
    domain: str  # Of what: `package`, a board's rail, `whole device, at BAT0`
    counts: bool  # Whether it counts joules; else it shows watts
    seconds: float  # All timed samples together
    joules: Joules | None = None  # In these seconds; None where there is no telling, and `problem` says why
    idle_seconds: float = 0.0  # Before the process was started; 0 where nobody looked then
    idle_joules: Joules | None = None  # In those
    step: float | None = None  # Least difference between two readings: joules of a counter, watts of a sensor
    # Seconds from one change of its reading to the next, the median; None where it changed less than twice
    update_s: float | None = None
    problem: str | None = None  # Why its readings say nothing; None where they do


@dataclass(frozen=True)
class ProcessEnergy:
    """What the meters of a machine told of one process."""

    meters: tuple[Metered, ...] = ()  # The one that says most of a run first
    # Why there is none, or which may not be read; None where all that are there may
    hidden: str | None = None
