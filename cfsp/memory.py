"""Free memory, checked before a model is loaded; what is asked for is a lower bound, so nothing is refused that works.

Linux's control groups: https://docs.kernel.org/admin-guide/cgroup-v2.html, cgroup-v1/memory.html.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from cfsp.errors import InputError
from cfsp.units import format_bytes

_MOUNTS = Path("/proc/self/mounts")
_OURS = Path("/proc/self/cgroup")
LIMIT_FILE = {1: "memory.limit_in_bytes", 2: "memory.max"}
_USED_FILE = {1: "memory.usage_in_bytes", 2: "memory.current"}
_CACHED = {
    1: ("total_active_file", "total_inactive_file"),
    2: ("active_file", "inactive_file", "slab_reclaimable"),
}
"""Of memory.stat: what the system drops if it needs room."""
_KEPT_BY_DEFAULT, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = 2**25, -3, -1
SET_BY_USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""With these users say what glibc keeps; then nothing is changed."""


def keep_freed_memory(n_bytes: int = 2**28) -> None:
    """Let glibc keep freed tensors of up to 256 MiB: new pages cost more (benchmarks/freed_memory.py)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another library of C
        library = ctypes.CDLL(None)
        # Versions before 2.35 take at most the default; once one limit is set the other moves no more.
        if not any(name in os.environ for name in SET_BY_USERS) and any(
            library.mallopt(_M_MMAP_THRESHOLD, most) for most in (n_bytes, _KEPT_BY_DEFAULT)
        ):
            library.mallopt(_M_TRIM_THRESHOLD, n_bytes)


def give_back_large_tensors() -> None:
    """Undo `keep_freed_memory`, for models that memory does not hold."""
    keep_freed_memory(_KEPT_BY_DEFAULT)
    give_back_memory()


def give_back_memory() -> None:
    """Give the pages of freed tensors back to the system."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_memory() -> int:
    """The most bytes that this process could have, swap included."""
    import psutil

    give_back_memory()

    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    # Elsewhere what is available leaves out what the system would compress or move to a file that grows.
    of_machine = memory.available if sys.platform == "linux" else memory.total
    free = [int(of_machine + swap.free)]
    for version, folder, limit in _limits():
        with contextlib.suppress(OSError, ValueError):
            used = int((folder / _USED_FILE[version]).read_text(encoding="ascii"))
            stated = read_table(folder / "memory.stat")
            cached = sum(stated.get(name, 0) for name in _CACHED[version])
            free.append(int(limit - used + cached + swap.free))
    return max(0, min(free))


def require_memory(n_bytes: int, what: str, less: str) -> None:
    """Raise InputError if `what` takes at least n_bytes, and fewer are free; `less` would take less."""
    free = free_memory()
    if n_bytes > free:
        raise InputError(
            f"{what} takes {format_bytes(n_bytes)} of memory at least, and {format_bytes(free)} are free",
            allowed=less,
        )


def control_groups() -> Iterator[tuple[int, Path]]:
    """(version, folder) of our own group and, in version 2, of those above it."""
    mounts = [line.split() for line in _MOUNTS.read_text(encoding="utf-8").splitlines()]
    for entry in _OURS.read_text(encoding="utf-8").splitlines():
        _, controllers, path = entry.split(":", 2)
        for _, mount, kind, options, *_ in mounts:
            if kind == "cgroup" and "memory" in options.split(",") and "memory" in controllers.split(","):
                yield 1, Path(mount + path)
            elif kind == "cgroup2" and not controllers:
                own = Path(mount + path)
                for folder in (own, *own.parents):
                    if folder.is_relative_to(mount) and lists_memory(folder / "cgroup.controllers"):
                        yield 2, folder


def lists_memory(file: Path) -> bool:
    """Whether a group's list of controllers has memory's."""
    return file.exists() and "memory" in file.read_text(encoding="ascii").split()


def read_table(file: Path) -> dict[str, int]:
    """A group's file of names and numbers."""
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {name: int(value) for name, value in lines}


def _limits() -> Iterator[tuple[int, Path, int]]:
    """(version, folder, limit in bytes) of groups that have one."""
    for version, folder in control_groups() if _OURS.exists() else ():
        with contextlib.suppress(OSError, ValueError):  # the root has no limit, and "max" is none
            yield version, folder, int((folder / LIMIT_FILE[version]).read_text(encoding="ascii"))
