"""A Linux control group with a memory limit, and what its counters say afterwards; versions 1 and 2.

https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cfsp.errors import InputError

_MOUNTS = Path("/proc/self/mounts")
_OURS = Path("/proc/self/cgroup")
_EMPTY_S = 10.0
"""How long the kernel may take to empty a group whose processes have ended."""


@dataclass(frozen=True)
class _Files:
    """Where a version keeps what is set and counted."""

    limit: str
    swap: str
    peak: str
    events: str


_VERSIONS = {
    1: _Files(
        limit="memory.limit_in_bytes",
        swap="memory.memsw.limit_in_bytes",
        peak="memory.max_usage_in_bytes",
        events="memory.oom_control",
    ),
    2: _Files(limit="memory.max", swap="memory.swap.max", peak="memory.peak", events="memory.events"),
}


@dataclass(frozen=True)
class MemoryCounters:
    """What a group has seen.

    Attributes:
        oom_kills: Processes that were killed because the limit was reached.
        peak_bytes: Most memory charged, pages of files included; None where the kernel does not say.
        major_faults: Page faults that had to read from the disk.
        reread_bytes: Pages of files that were dropped and read again.
    """

    oom_kills: int
    peak_bytes: int | None
    major_faults: int
    reread_bytes: int


@dataclass(frozen=True)
class ControlGroup:
    """A group of our own."""

    folder: Path
    version: int

    @property
    def processes(self) -> Path:
        """Where a process writes 0 to enter."""
        return self.folder / "cgroup.procs"

    def counters(self) -> MemoryCounters:
        """The counters now."""
        files = _VERSIONS[self.version]
        peak = self.folder / files.peak
        stat = _table(self.folder / "memory.stat")
        return MemoryCounters(
            oom_kills=_table(self.folder / files.events).get("oom_kill", 0),
            peak_bytes=int(peak.read_text(encoding="ascii")) if peak.exists() else None,
            major_faults=stat.get("pgmajfault", 0),
            reread_bytes=stat.get("workingset_refault_file", 0) * os.sysconf("SC_PAGE_SIZE"),
        )


def find_parent() -> tuple[Path, int]:
    """The group below which this process may make groups with a memory limit, and the version.

    Raises:
        InputError: There is none; the message says why.
    """
    reasons = []
    for version, folder in _candidates():
        if not os.access(folder, os.W_OK):
            reasons.append(f"{folder} cannot be written")
        elif version == 2 and not _delegates_memory(folder):
            reasons.append(f"{folder} does not hand the memory controller on")
        else:
            return folder, version
    why = "; ".join(reasons) or "no control groups with a memory controller are mounted"
    raise InputError(
        f"no memory limit can be set here: {why}",
        field="memory",
        allowed="run it as root",
    )


@contextmanager
def limited_group(limit_bytes: int) -> Iterator[ControlGroup]:
    """A group in which processes get no more than `limit_bytes`, swap included; removed afterwards.

    Raises:
        InputError: No such group can be made here.
    """
    parent, version = find_parent()
    files = _VERSIONS[version]
    group = ControlGroup(parent / f"phoneready-{os.getpid()}-{uuid.uuid4().hex[:8]}", version)
    group.folder.mkdir()
    try:
        (group.folder / files.limit).write_text(str(limit_bytes), encoding="ascii")
        # Version 1 counts memory and swap together, version 2 swap alone; either may be off in the kernel.
        with contextlib.suppress(OSError):
            (group.folder / files.swap).write_text(str(limit_bytes if version == 1 else 0), encoding="ascii")
        yield group
    finally:
        _remove(group.folder)


def _candidates() -> Iterator[tuple[int, Path]]:
    """(version, folder) of our own group and, in version 2, of those above it: only a group without processes of its
    own, or the root, hands controllers on."""
    mounts = [line.split() for line in _MOUNTS.read_text(encoding="utf-8").splitlines()]
    for entry in _OURS.read_text(encoding="utf-8").splitlines():
        _, controllers, path = entry.split(":", 2)
        for _, mount, kind, options, *_ in mounts:
            if kind == "cgroup" and "memory" in options.split(",") and "memory" in controllers.split(","):
                yield 1, Path(mount + path)
            elif kind == "cgroup2" and not controllers:
                own = Path(mount + path)
                for folder in (own, *own.parents):
                    if folder.is_relative_to(mount) and _has_memory(folder):
                        yield 2, folder


def _has_memory(folder: Path) -> bool:
    file = folder / "cgroup.controllers"
    return file.exists() and "memory" in file.read_text(encoding="ascii").split()


def _delegates_memory(folder: Path) -> bool:
    """Whether groups below get the controller, which is turned on where it may be."""
    control = folder / "cgroup.subtree_control"
    if "memory" not in control.read_text(encoding="ascii").split():
        try:
            control.write_text("+memory", encoding="ascii")
        except OSError:
            return False
    return True


def _table(file: Path) -> dict[str, int]:
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {name: int(value) for name, value in lines}


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + _EMPTY_S
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
