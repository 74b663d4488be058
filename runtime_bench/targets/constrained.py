"""This machine under a phone's limits: memory by a control group, cores by affinity.

A model can fail its limit in two ways, which look alike from outside and are told apart by the group's counters. What
is allocated cannot be dropped: the process is killed. Weights that are mapped from a file can be dropped and read
again, for every token: the run ends, at the speed of the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cfsp.errors import InputError
from runtime_bench.cgroup import ControlGroup, find_parent, limited_group
from runtime_bench.counters import evict_from_page_cache
from runtime_bench.environment import describe_environment
from runtime_bench.files import files_of, size_of
from runtime_bench.process import run_worker
from runtime_bench.records.bench_record import DOES_NOT_FIT, FITS, THRASHES, Environment
from runtime_bench.targets import ThisMachine
from runtime_bench.worker import WorkerRequest, WorkerResult

REREAD_SHARE = 0.5
"""Of the file that may be read again before a run counts as thrashing."""
_LEAST_BYTES = 16 * 2**20
MIB = 2**20


def check_memory(limit_bytes: int) -> None:
    """Raise InputError where no run fits into that much memory."""
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

    # What a run may use, its file's pages included; None limits nothing
    memory_limit_bytes: int | None = None
    cores: tuple[int, ...] = ()  # Numbers of the cores it may run on; empty for all

    kind = "constrained-host"

    def __post_init__(self) -> None:
        if self.memory_limit_bytes is None and not self.cores:
            raise InputError("a constrained target wants a memory limit or cores", field="on")
        missing = sorted(set(self.cores) - os.sched_getaffinity(0))
        if missing:
            raise InputError(
                "cores that this process may not use",
                field="cores",
                value=missing,
                allowed=", ".join(map(str, sorted(os.sched_getaffinity(0)))),
            )
        if self.memory_limit_bytes is not None:
            check_memory(self.memory_limit_bytes)
            find_parent()

    @property
    def name(self) -> str:
        """As records have it, such as `constrained(memory=400MiB, cores=0+1)`."""
        limits = []
        if self.memory_limit_bytes is not None:
            limits.append(f"memory={self.memory_limit_bytes / MIB:g}MiB")
        if self.cores:
            limits.append(f"cores={'+'.join(map(str, self.cores))}")
        return f"constrained({', '.join(limits)})"

    def environment(self) -> Environment:
        """See `Target`."""
        environment = describe_environment()
        return replace(environment, cpus_usable=len(set(self.cores))) if self.cores else environment

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        """See `Target`; the result says whether the model fits."""
        if self.memory_limit_bytes is None:
            return run_worker(request, timeout_s, before=self._enter(None))
        path = Path(request.path)
        for file in files_of(path):
            # Pages that are in memory already are charged to whoever read them first, and would cost nothing here.
            evict_from_page_cache(file)
        with limited_group(self.memory_limit_bytes) as group:
            result = run_worker(request, timeout_s, before=self._enter(group.processes))
            return _judged(result, group, self.memory_limit_bytes, size_of(path))

    def _enter(self, processes: Path | None) -> Callable[[], None]:
        """What the new process does before anything is loaded."""

        def enter() -> None:
            if processes is not None:
                with open(processes, "w") as stream:  # noqa: PTH123  (between fork and exec: as little as possible)
                    stream.write("0")
            if self.cores:
                os.sched_setaffinity(0, self.cores)

        return enter


def _judged(result: WorkerResult, group: ControlGroup, limit: int, file_bytes: int) -> WorkerResult:
    if group.oom_kills:
        error = f"{DOES_NOT_FIT}: killed at the limit of {limit / MIB:g} MiB"
        return replace(result, error=error, memory_verdict=DOES_NOT_FIT)
    if result.error:
        return result
    again = group.reread_bytes
    verdict = THRASHES if again > REREAD_SHARE * file_bytes else FITS
    return replace(result, memory_verdict=verdict, reread_bytes=again)
