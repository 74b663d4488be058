"""This machine under a phone's limits: memory by a Linux control group (version 1 or 2), cores by affinity.

A model can fail its limit in two ways, which look alike from outside and are told apart by the group's counters. What
is allocated cannot be dropped: the process is killed. Weights that are mapped from a file can be dropped and read
again, for every token: the run ends, at the speed of the disk.

https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from cfsp.errors import InputError
from cfsp.memory import LIMIT_FILE, control_groups, lists_memory, read_table
from runtime_bench.counters import evict_from_page_cache
from runtime_bench.engines import files_of, size_of
from runtime_bench.environment import describe_environment
from runtime_bench.process import run_worker
from runtime_bench.records.bench_record import DOES_NOT_FIT, FITS, THRASHES, Environment
from runtime_bench.targets import ThisMachine
from runtime_bench.worker import WorkerRequest, WorkerResult

REREAD_SHARE = 0.5
"""Of the file that may be read again before a run counts as thrashing."""
MIB = 2**20
_LEAST_BYTES = 16 * MIB
_EMPTY_S = 10.0
"""How long the kernel may take to empty a group whose processes have ended."""
_SWAP = {1: "memory.memsw.limit_in_bytes", 2: "memory.swap.max"}
_EVENTS = {1: "memory.oom_control", 2: "memory.events"}
"""Where each version keeps what is set and counted."""


class ControlGroup(NamedTuple):
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


def find_parent() -> tuple[Path, int]:
    """The group below which this process may make groups with a memory limit, and the version.

    Raises:
        InputError: There is none; the message says why.
    """
    reasons = []
    for version, folder in control_groups():
        control = folder / "cgroup.subtree_control"
        if not os.access(folder, os.W_OK):
            reasons.append(f"{folder} cannot be written")
            continue
        try:
            if version == 2 and not lists_memory(control):  # groups below get no controller yet
                control.write_text("+memory", encoding="ascii")
        except OSError:
            reasons.append(f"{folder} does not hand the memory controller on")
            continue
        return folder, version
    why = "; ".join(reasons) or "no control groups with a memory controller are mounted"
    raise InputError(f"no memory limit can be set here: {why}", field="memory", allowed="run it as root")


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
        # Version 1 counts memory and swap together, version 2 only swap; either may be off in the kernel.
        with contextlib.suppress(OSError):
            swap = limit_bytes if version == 1 else 0
            (group.folder / _SWAP[version]).write_text(str(swap), encoding="ascii")
        yield group
    finally:
        deadline = time.monotonic() + _EMPTY_S
        while True:
            try:
                group.folder.rmdir()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def check_memory(limit_bytes: int) -> None:
    """Raise InputError if no run fits into that much memory."""
    if limit_bytes < _LEAST_BYTES:
        allowed = f"{_LEAST_BYTES // MIB} MiB or more"
        raise InputError("too little to start in", field="memory", value=limit_bytes, allowed=allowed)


@dataclass(frozen=True)
class Constrained(ThisMachine):
    """This machine with less memory or fewer cores.

    Raises:
        InputError: Nothing to limit, too little memory to start Python in, cores that are not there, or no way to
            set a memory limit here.
    """

    memory_limit_bytes: int | None = (
        None  # What a run may use, its file's pages included; None limits nothing
    )
    cores: tuple[int, ...] = ()  # Numbers of the cores it may run on; empty for all

    kind = "constrained-host"

    def __post_init__(self) -> None:
        if self.memory_limit_bytes is None and not self.cores:
            raise InputError("a constrained target wants a memory limit or cores", field="on")
        if missing := sorted(set(self.cores) - os.sched_getaffinity(0)):
            allowed = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
            raise InputError(
                "cores that this process may not use", field="cores", value=missing, allowed=allowed
            )
        if self.memory_limit_bytes is not None:
            check_memory(self.memory_limit_bytes)
            find_parent()

    @property
    def name(self) -> str:
        """Such as `constrained(memory=400MiB, cores=0+1)`."""
        limits = []
        if self.memory_limit_bytes is not None:
            limits.append(f"memory={self.memory_limit_bytes / MIB:g}MiB")
        if self.cores:
            limits.append(f"cores={'+'.join(map(str, self.cores))}")
        return f"constrained({', '.join(limits)})"

    def environment(self) -> Environment:
        environment = describe_environment()
        return replace(environment, cpus_usable=len(set(self.cores))) if self.cores else environment

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        """See `Target`; the result says whether the model fits."""
        if self.memory_limit_bytes is None:
            return run_worker(request, timeout_s, before=self._enter)
        path = Path(request.path)
        for file in files_of(path):
            # Pages that are in memory already are charged to whoever read them first, and would cost nothing here.
            evict_from_page_cache(file)
        with limited_group(self.memory_limit_bytes) as group:
            result = run_worker(request, timeout_s, before=lambda: self._enter(group.processes))
            if group.oom_kills:
                error = f"{DOES_NOT_FIT}: killed at the limit of {self.memory_limit_bytes / MIB:g} MiB"
                return replace(result, error=error, memory_verdict=DOES_NOT_FIT)
            if result.error:
                return result
            # Pages of files that were dropped and read again
            pages = read_table(group.folder / "memory.stat").get("workingset_refault_file", 0)
            again = pages * os.sysconf("SC_PAGE_SIZE")
            verdict = THRASHES if again > REREAD_SHARE * size_of(path) else FITS
            return replace(result, memory_verdict=verdict, reread_bytes=again)

    def _enter(self, processes: Path | None = None) -> None:
        """What the new process does before anything is loaded: as little as possible, between fork and exec."""
        if processes is not None:
            with open(processes, "w") as stream:  # noqa: PTH123
                stream.write("0")
        if self.cores:
            os.sched_setaffinity(0, self.cores)
