"""Heat: which clocks the system allowed around a run, and how hot the machine was.

A phone that is hot lowers the highest clock of its cores (`scaling_max_freq` below `cpuinfo_max_freq`), and says so
before and after a run. The clock of the moment is no help: between two runs cores idle at their lowest. A machine that
shows neither clocks nor zones, as most virtual machines, gives None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime_bench.records.bench_record import Environment

CAP_LIMIT = 0.15
"""A run is marked when a core's clock was capped by more than this."""


@dataclass(frozen=True)
class Heat:
    """The machine around one run; None is not known.

    Attributes:
        clock_cap: Least share of its highest clock that any core was allowed, before or after.
        hottest_c: Hottest thermal zone, before or after, in degrees Celsius.
    """

    clock_cap: float | None
    hottest_c: float | None


def clock_cap(environment: Environment) -> float | None:
    """Least share of its highest clock that any core is allowed; None where the machine shows no clocks."""
    caps, highest = environment.core_cap_khz, environment.core_max_khz
    if not caps or len(caps) != len(highest):
        return None
    return min(cap / most for cap, most in zip(caps, highest, strict=True))


def hottest_c(environment: Environment) -> float | None:
    """Hottest thermal zone; None without zones."""
    return max(environment.temperatures_c.values(), default=None)


def heat_around(before: Environment, after: Environment) -> Heat:
    """The worse of two looks at the machine."""
    caps = [cap for cap in map(clock_cap, (before, after)) if cap is not None]
    zones = [zone for zone in map(hottest_c, (before, after)) if zone is not None]
    return Heat(min(caps, default=None), max(zones, default=None))


def capped(clock_caps: Sequence[float | None]) -> list[float]:
    """The caps that are below the limit."""
    return [cap for cap in clock_caps if cap is not None and cap < 1 - CAP_LIMIT]
