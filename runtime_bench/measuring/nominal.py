"""A fair start: wait until a machine is as it is when nothing has been asked of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import MappingProxyType

from runtime_bench.records.fairness import CAP_LIMIT
from runtime_bench.records.reported import Conditions
from runtime_bench.targets import Target
from runtime_bench.workload import SamplingSettings

logger = logging.getLogger(__name__)
_POLL_S = 2.0


def lacking(conditions: Conditions, settings: SamplingSettings) -> str | None:
    """What keeps a machine from being nominal, by its last look; None where nothing does, or nothing tells."""
    found = []
    for name, check in _CHECKS.items():
        values = [value for value in getattr(conditions, name) if value is not None]
        found += [why for value in values[-1:] if (why := check(value, settings))]
    return ", ".join(found) or None


def wait_nominal(target: Target, settings: SamplingSettings) -> str | None:
    """Wait until a target is nominal, for `wait_nominal_s` at most; says once what it waits for.

    Returns:
        What was not nominal even then; None where all is.
    """
    deadline, told = time.monotonic() + settings.wait_nominal_s, False
    while (why := lacking(target.conditions(), settings)) is not None:
        left = deadline - time.monotonic()
        if left <= 0:
            return f"not nominal after {settings.wait_nominal_s:g} s: {why}"
        if not told:
            logger.warning("%s: waiting until it is nominal: %s", target.name, why)
            told = True
        time.sleep(min(_POLL_S, left))
    return None


def _cap(cap: float, settings: SamplingSettings) -> str:
    return f"clocks are capped at {cap:.0%}" if cap < 1 - CAP_LIMIT else ""


def _heat(hottest_c: float, settings: SamplingSettings) -> str:
    limit = settings.nominal_c
    return f"a thermal zone has {hottest_c:.1f} °C, above {limit:g}" if hottest_c > limit else ""


def _status(status: int, settings: SamplingSettings) -> str:
    return f"the system's thermal status is {status}" if status else ""


def _power(charging: bool, settings: SamplingSettings) -> str:
    return "power comes from outside" if charging and settings.unplugged else ""


_CHECKS: MappingProxyType[str, Callable[..., str]] = MappingProxyType(
    {"caps": _cap, "hottest_c": _heat, "thermal_status": _status, "charging": _power}
)
"""Series -> why a value of it is not nominal; empty where it is."""
