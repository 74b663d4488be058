"""Heat: which clocks the system allowed around a run, and how hot the machine was.

A phone that is hot lowers the highest clock of its cores (`scaling_max_freq` below `cpuinfo_max_freq`), and says so
before and after a run. The clock of the moment is no help: between two runs cores idle at their lowest. A machine that
shows neither clocks nor zones, as most virtual machines, gives None.
"""

from __future__ import annotations

from runtime_bench.records.bench_record import Environment

CAP_LIMIT = 0.15
"""A run is marked when a core's clock was capped by more than this."""


def clock_cap(*looks: Environment) -> float | None:
    """Least share of its highest clock that any core was allowed in any look; None where no clocks are shown."""
    shares = [
        cap / most
        for look in looks
        if len(look.core_cap_khz) == len(look.core_max_khz)
        for cap, most in zip(look.core_cap_khz, look.core_max_khz, strict=True)
    ]
    return min(shares, default=None)


def hottest_c(*looks: Environment) -> float | None:
    """Hottest thermal zone in any look; None without zones."""
    return max((zone for look in looks for zone in look.temperatures_c.values()), default=None)
