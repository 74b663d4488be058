"""What is reported of one measuring process beside its samples. It imports the standard library only, for workers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

INTERVAL_S = 0.5
"""Between two samples of the machine's conditions."""
METER_S = 0.1
"""Between two readings of an energy meter."""
FLOAT_CACHES = frozenset({"f32", "f16", "bf16"})
"""Types of a key-value cache that are not quantized."""
PROCESSOR = frozenset({"CPU", "wasm"})
"""`backends` of an engine that computes on the processor only."""
_REARRANGED = frozenset({"CPU_REPACK", "CPU_KLEIDIAI", "AMX"})
"""llama.cpp's buffers of rearranged weights."""


@dataclass(frozen=True)
class Conditions:
    """The machine during a process: series with one value a reading, None if a reading lacks it.

    `hidden` says why a series is empty. Shares are of 1, times in seconds since the first reading.
    """

    at_s: tuple[float, ...] = ()
    samples_s: tuple[tuple[float, float], ...] = ()  # begin and end of each timed sample
    caps: tuple[float | None, ...] = ()  # lowest clock limit of any core, of its highest clock
    clocks: tuple[float | None, ...] = ()  # highest current clock, of its highest clock
    hottest_c: tuple[float | None, ...] = ()  # hottest thermal zone, degrees Celsius
    thermal_status: tuple[int | None, ...] = ()  # Android's: 0 (none) to 6 (shutdown)
    charging: tuple[bool | None, ...] = ()  # whether there is external power
    low_power: tuple[bool | None, ...] = ()
    screen_on: tuple[bool | None, ...] = ()
    others_cores: tuple[float | None, ...] = ()  # cores that other programs used since the reading before
    stolen_cores: tuple[float | None, ...] = ()  # cores that the hypervisor took since then
    held_share: tuple[float | None, ...] = ()  # share of that time in which a quota stopped the process
    hidden: dict[str, str] = field(default_factory=dict)

    def during_samples(self, name: str) -> list[tuple[float, Any]]:
        """(seconds, value) of a series while samples were timed, and the last value before and the first after each."""
        known = [(at, v) for at, v in zip(self.at_s, getattr(self, name), strict=False) if v is not None]
        if not self.samples_s:
            return known
        times = [at for at, _ in known]
        spans = zip(times[:1] + times[:-1], times[1:] + times[-1:], strict=True)
        ended = [end for _, end in self.samples_s]  # one sample follows the other
        return [
            one
            for one, (before, after) in zip(known, spans, strict=True)
            if (i := bisect_left(ended, before)) < len(ended) and self.samples_s[i][0] <= after
        ]

    def hiding(self, name: str, why: str) -> Conditions:
        """The same without a series."""
        return replace(self, **{name: ()}, hidden=self.hidden | {name: why})


SERIES = tuple(f.name for f in fields(Conditions) if f.name not in ("at_s", "samples_s", "hidden"))


def unknown_conditions(why: str) -> Conditions:
    """Conditions without any series, for one reason."""
    return Conditions(hidden=dict.fromkeys(SERIES, why))


@dataclass(frozen=True)
class Contention:
    """Cores that were used by others during a process, on average."""

    others_cores: float  # other programs
    stolen_cores: float  # the host of a virtual machine


@dataclass(frozen=True)
class Joules:
    """An energy and its bounds."""

    low: float
    value: float
    high: float

    def __add__(self, other: Joules) -> Joules:
        """The sum; errors add up, since they may have one cause."""
        return Joules(self.low + other.low, self.value + other.value, self.high + other.high)

    def times(self, factor: float) -> Joules:
        """Scaled by a factor that is not negative."""
        return Joules(self.low * factor, self.value * factor, self.high * factor)

    @property
    def error(self) -> float:
        """Largest distance of a bound from the value."""
        return max(self.high - self.value, self.value - self.low)


@dataclass(frozen=True)
class Metered:
    """What one meter reported of one process's samples; without joules `problem` says why."""

    method: str  # such as RAPL counter
    domain: str  # of what: package, or the whole device at a battery
    seconds: float  # of all samples
    joules: Joules | None = None
    problem: str | None = None


@dataclass(frozen=True)
class ProcessEnergy:
    """The meters of one process, the best first; `hidden` says which may not be read, or why there are none."""

    meters: tuple[Metered, ...] = ()
    hidden: str | None = None


@dataclass(frozen=True)
class Throttling:
    """How a page was slowed down to a device's score."""

    target_score: float
    host_score: float  # without throttling
    rate: float  # that Chromium was told
    reached_score: float

    @property
    def text(self) -> str:
        """For a reader of figures."""
        return (
            f"slowed down {self.host_score / self.reached_score:.1f} times: score {self.host_score:.0f} here, "
            f"{self.target_score:.0f} wanted, {self.reached_score:.0f} reached at the rate {self.rate:.2f}"
        )


@dataclass(frozen=True)
class EngineSettings:
    """How an engine computed; what it does not report is None or empty."""

    cache_type: str | None = None  # of keys and values, in llama.cpp's names
    flash_attention: bool | None = None
    weight_buffers: Mapping[str, int] = field(default_factory=dict)  # llama.cpp's buffer -> bytes of weights
    cores: tuple[int, ...] = ()  # that the process might use
    providers: Mapping[str, int] = field(default_factory=dict)  # ONNX Runtime's -> nodes of the graph
    asked_backend: str | None = None

    @property
    def rearranged_bytes(self) -> int:
        """Bytes of weights that llama.cpp copied into another layout."""
        return sum(size for name, size in self.weight_buffers.items() if name in _REARRANGED)

    @property
    def quantized_cache(self) -> str | None:
        """The cache's type if it is quantized."""
        return None if self.cache_type in FLOAT_CACHES else self.cache_type


def fell_back(asked: str | None, backends: str | None) -> str | None:
    """The backend that was asked for and did not compute; None if it did, or none was asked for."""
    return asked if asked not in (None, "cpu") and backends in PROCESSOR else None
