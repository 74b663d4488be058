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
    """An energy, joules, and what it lies between.

    Attributes:
        low: It is not less.
        value: The best guess.
        high: It is not more.
    """

    low: float
    value: float
    high: float

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
    """What one meter told of one process.

    Attributes:
        method: How, such as `RAPL counter`.
        domain: Of what: `package`, a board's rail, `whole device, at BAT0`.
        counts: Whether it counts joules; else it shows watts.
        seconds: All timed samples together.
        joules: In these seconds; None where there is no telling, and `problem` says why.
        idle_seconds: Before the process was started; 0 where nobody looked then.
        idle_joules: In those.
        step: Least difference between two readings: joules of a counter, watts of a sensor.
        update_s: Seconds from one change of its reading to the next, the median; None where it changed less than twice.
        problem: Why its readings say nothing; None where they do.
    """

    method: str
    domain: str
    counts: bool
    seconds: float
    joules: Joules | None = None
    idle_seconds: float = 0.0
    idle_joules: Joules | None = None
    step: float | None = None
    update_s: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class ProcessEnergy:
    """What the meters of a machine told of one process.

    Attributes:
        meters: The one that says most of a run first.
        hidden: Why there is none, or which may not be read; None where all that are there may.
    """

    meters: tuple[Metered, ...] = ()
    hidden: str | None = None
