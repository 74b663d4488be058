"""Contention for the cores, as Linux tells it.

What all programs used meanwhile, less our own, and what the host of a virtual machine took away, are in /proc/stat; how
long our threads waited for a core is in /proc/self/task/*/schedstat.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_STAT, _TASKS = Path("/proc/stat"), Path("/proc/self/task")
STEAL = 7
"""Field of a core's line in /proc/stat, after user, nice, system, idle, iowait, irq and softirq."""
BUSY = (0, 1, 2, 5, 6)
"""Fields of what programs did: neither idle nor waiting for a disk."""


@dataclass(frozen=True)
class Contention:
    """What else used the cores during one process, in cores, averaged over its life."""

    others_cores: float  # Other programs' processor time per second
    stolen_cores: float  # Time per second that the host of a virtual machine took away


CoreTimes = tuple[float, float, float, float]
"""Seconds until now, on the cores that this process may use: by the clock, busy with any program, taken by the host,
and used by this process and its children that have ended."""


def core_times() -> CoreTimes | None:
    """A look at the cores; None where the system does not tell."""
    try:
        lines = _STAT.read_text(encoding="ascii").splitlines()
        cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        fields = [list(map(int, line.split()[1:])) for line in lines if line.partition(" ")[0] in cores]
        busy, stolen = (sum(row[i] for row in fields for i in which) for which in (BUSY, (STEAL,)))
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return None
    return time.monotonic(), busy / ticks, stolen / ticks, sum(os.times()[:4])


def contention_since(before: CoreTimes | None) -> Contention | None:
    """What else used the cores since an earlier look; None where that is not known."""
    after = core_times()
    if before is None or after is None or after[0] <= before[0]:
        return None
    wall, busy, stolen, own = (now - then for now, then in zip(after, before, strict=True))
    if busy < own / 2:  # a sandbox that counts nothing
        return None
    return Contention(max(0.0, busy - own) / wall, max(0.0, stolen) / wall)


def waited_ns() -> int | None:
    """How long all threads of this process have been ready and waited for a core; None where nothing tells."""
    try:
        texts = [path.read_text(encoding="ascii") for path in _TASKS.glob("*/schedstat")]
        return sum(int(text.split()[1]) for text in texts) if texts else None
    except (OSError, ValueError, IndexError):
        return None
