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


_LIMIT = {1: "memory.limit_in_bytes", 2: "memory.max"}
_SWAP = {1: "memory.memsw.limit_in_bytes", 2: "memory.swap.max"}
_EVENTS = {1: "memory.oom_control", 2: "memory.events"}
"""Where each version keeps what is set and counted."""


@dataclass(frozen=True)
class ControlGroup:
    """A group of our own."""

    folder: Path
    version: int

    @property
    def processes(self) -> Path:
        """Where a process writes 0 to enter."""
        return self.folder / "cgroup.procs"

    @property
    def oom_kills(self) -> int:
        """Processes that were killed because the limit was reached."""
        return _table(self.folder / _EVENTS[self.version]).get("oom_kill", 0)

    @property
    def reread_bytes(self) -> int:
        """Pages of files that were dropped and read again."""
        pages = _table(self.folder / "memory.stat").get("workingset_refault_file", 0)
        return pages * os.sysconf("SC_PAGE_SIZE")


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


def usable_memory() -> int:
    """Bytes that processes like this one may use together: the machine's memory, or what its groups are limited to."""
    import psutil

    limits = [int(psutil.virtual_memory().total)]
    for version, folder in _candidates() if _OURS.exists() else ():
        with contextlib.suppress(OSError, ValueError):  # the root has no limit, and "max" is none
            limits.append(int((folder / _LIMIT[version]).read_text(encoding="ascii")))
    return min(limits)


@contextmanager
def limited_group(limit_bytes: int) -> Iterator[ControlGroup]:
    """A group in which processes get no more than `limit_bytes`, swap included; removed afterwards.

    Raises:
        InputError: No such group can be made here.
    """
    parent, version = find_parent()
    group = ControlGroup(parent / f"phoneready-{os.getpid()}-{uuid.uuid4().hex[:8]}", version)
    group.folder.mkdir()
    try:
        (group.folder / _LIMIT[version]).write_text(str(limit_bytes), encoding="ascii")
        # Version 1 counts memory and swap together, version 2 swap alone; either may be off in the kernel.
        with contextlib.suppress(OSError):
            (group.folder / _SWAP[version]).write_text(
                str(limit_bytes if version == 1 else 0), encoding="ascii"
            )
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
                    if folder.is_relative_to(mount) and _lists_memory(folder / "cgroup.controllers"):
                        yield 2, folder


def _lists_memory(file: Path) -> bool:
    return file.exists() and "memory" in file.read_text(encoding="ascii").split()


def _delegates_memory(folder: Path) -> bool:
    """Whether groups below get the controller, which is turned on where it may be."""
    control = folder / "cgroup.subtree_control"
    if not _lists_memory(control):
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
