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
from cfsp.memory import LIMIT_FILE, control_groups, lists_memory, read_table

_EMPTY_S = 10.0
"""How long the kernel may take to empty a group whose processes have ended."""


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
        return read_table(self.folder / _EVENTS[self.version]).get("oom_kill", 0)

    @property
    def reread_bytes(self) -> int:
        """Pages of files that were dropped and read again."""
        pages = read_table(self.folder / "memory.stat").get("workingset_refault_file", 0)
        return pages * os.sysconf("SC_PAGE_SIZE")


def find_parent() -> tuple[Path, int]:
    """The group below which this process may make groups with a memory limit, and the version.

    Raises:
        InputError: There is none; the message says why.
    """
    reasons = []
    for version, folder in control_groups():
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
    group = ControlGroup(parent / f"phoneready-{os.getpid()}-{uuid.uuid4().hex[:8]}", version)
    group.folder.mkdir()
    try:
        (group.folder / LIMIT_FILE[version]).write_text(str(limit_bytes), encoding="ascii")
        # Version 1 counts memory and swap together, version 2 swap alone; either may be off in the kernel.
        with contextlib.suppress(OSError):
            (group.folder / _SWAP[version]).write_text(
                str(limit_bytes if version == 1 else 0), encoding="ascii"
            )
        yield group
    finally:
        _remove(group.folder)


def _delegates_memory(folder: Path) -> bool:
    """Whether groups below get the controller, which is turned on where it may be."""
    control = folder / "cgroup.subtree_control"
    if not lists_memory(control):
        try:
            control.write_text("+memory", encoding="ascii")
        except OSError:
            return False
    return True


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
