"""What a process used at most, and how much of a file the system holds in memory.

Sizes are bytes. A figure that the system does not give is None.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path


def peak_rss_bytes(pid: int | None = None) -> int | None:
    """Highest resident set size of this process, or another one, since it began to run its program.

    Another's is known on Linux alone. Its VmHWM belongs to the address space and starts anew with exec. ru_maxrss, the
    fallback, does not: a small program started by a large one begins with the large one's value, so it is only used
    where there is no /proc.
    """
    peak = _status_bytes("VmHWM", str(pid or "self"))
    return peak or (_maxrss_bytes() if pid is None else None)


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


def _maxrss_bytes() -> int | None:
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit or None
