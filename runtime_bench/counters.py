"""What the system counts: a process's memory, a file's pages in memory, and who had the cores.

Sizes are bytes. A figure that the system does not give is None.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from pathlib import Path

_STAT, _TASKS = Path("/proc/stat"), Path("/proc/self/task")
STEAL = 7
"""Field of a core's line in /proc/stat, after user, nice, system, idle, iowait, irq and softirq."""
BUSY = (0, 1, 2, 5, 6)
"""Fields of what programs did: neither idle nor waiting for a disk."""
CoreTimes = tuple[float, float, float, float]
"""Seconds until now, on the cores that this process may use: by the clock, busy with any program, taken by the host,
and used by this process and its children that have ended."""


def peak_rss_bytes(pid: int | None = None) -> int | None:
    """Highest resident set size of this process, or another one (Linux only), since it began to run its program.

    VmHWM starts anew with exec. ru_maxrss, the fallback without /proc, does not: a small program started by a large one
    begins with the large one's value.
    """
    peak = _status_bytes("VmHWM", str(pid or "self"))
    if peak is not None or pid is not None:
        return peak
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit or None


def current_rss_bytes() -> int | None:
    """Resident set size of this process now."""
    resident = _status_bytes("VmRSS")
    if resident is not None:
        return resident
    import psutil

    return int(psutil.Process().memory_info().rss)


def major_faults() -> int | None:
    """How often this process has waited for a page from the disk; None where that is not counted."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def page_cache_share(path: Path) -> float | None:
    """Share of a file's pages that are in memory, in [0, 1], by mincore(2); None where that cannot be asked.

    Linux answers truthfully only for files that the caller owns or may write.
    """
    size = path.stat().st_size
    if not sys.platform.startswith("linux") or size == 0 or not os.access(path, os.W_OK):
        return None
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        pages = -(-size // mmap.PAGESIZE)
        flags = (ctypes.c_ubyte * pages)()
        anchor = ctypes.c_char.from_buffer(view)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            address = ctypes.c_void_p(ctypes.addressof(anchor))
            status = libc.mincore(address, ctypes.c_size_t(size), flags)
        finally:
            del anchor  # the mapping cannot be closed while something points into it
        return sum(flag & 1 for flag in flags) / pages if status == 0 else None


def evict_from_page_cache(path: Path) -> None:
    """Ask the system to forget a file's pages; it may refuse, so ask `page_cache_share` what came of it."""
    if not hasattr(os, "posix_fadvise"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # dirty pages are never dropped
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _status_bytes(key: str, process: str = "self") -> int | None:
    try:
        lines = Path("/proc", process, "status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


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


def cores_since(before: CoreTimes | None) -> tuple[float, float] | None:
    """Cores that others used since an earlier reading, on average: other programs, and the host of a virtual machine.
    None if that is not known."""
    after = core_times()
    if before is None or after is None or after[0] <= before[0]:
        return None
    wall, busy, stolen, own = (now - then for now, then in zip(after, before, strict=True))
    if busy < own / 2:  # a sandbox that counts nothing
        return None
    return max(0.0, busy - own) / wall, max(0.0, stolen) / wall


def waited_ns() -> int | None:
    """How long all threads of this process have been ready and waited for a core; None where nothing tells."""
    try:
        texts = [path.read_text(encoding="ascii") for path in _TASKS.glob("*/schedstat")]
        return sum(int(text.split()[1]) for text in texts) if texts else None
    except (OSError, ValueError, IndexError):
        return None
