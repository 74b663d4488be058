"""Targets on this machine: under a phone's limits, in a browser, and in the native runner, here or emulated.

Memory is limited by a Linux control group (version 1 or 2), cores by affinity. A model can fail its limit in two ways,
which the group's counters tell apart. What is allocated cannot be dropped: the process is killed. Weights that are
mapped from a file can be dropped and read again, for every token: the run ends, at the speed of the disk.
https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html

The browser is headless Chromium with the model in a page as WebAssembly. Its numbers are this machine's, and say
nothing of a phone unless the page is slowed down to a phone's score.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from cfsp.child_process import python_module
from cfsp.errors import InputError, PhonereadyError, require_extra
from cfsp.memory import LIMIT_FILE, control_groups, lists_memory, read_table
from cfsp.progress import Progress, no_progress
from cfsp.records import tool_version
from runtime_bench.browser.chromium import fetch_packages, find_chromium
from runtime_bench.counters import evict_from_page_cache
from runtime_bench.engines import files_of, size_of
from runtime_bench.environment import describe_environment, environment_of
from runtime_bench.native.build import build_runner
from runtime_bench.process import ProcessFailed, exchange, measure_in, read_answer, run_worker
from runtime_bench.records.bench_record import DOES_NOT_FIT, EMULATED, FITS, THRASHES, Environment
from runtime_bench.records.reported import Throttling
from runtime_bench.targets import ThisMachine
from runtime_bench.worker import AnswerRequest, AnswerResult, WorkerRequest, WorkerResult
from runtime_bench.workload import default_threads

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
    """The group below which this process may make groups with a memory limit, and the version. Raises
    InputError: there is none; the message says why."""
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
    """A group in which processes get no more than `limit_bytes`, swap included; removed afterwards. Raises
    InputError: no such group can be made here."""
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
    """This machine with less memory or fewer cores. Raises InputError: nothing to limit, too little memory to
    start Python in, cores that are not there, or no way to set a memory limit here."""

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


BROWSER_ENGINES = MappingProxyType({".onnx": "onnxruntime-web", ".gguf": "wllama"})
"""Suffix of a file -> what runs it in a page."""


@dataclass
class Browser(ThisMachine):
    """Headless Chromium on this machine."""

    device: str | None = None  # Id of the device that it stands for
    target_score: float | None = None  # The page is slowed down to this score; None leaves it as it is
    # What that came to in the first run that got so far; the runs after it use it again, so that files which
    # take turns have the same processor
    throttling: Throttling | None = field(default=None, init=False, compare=False)

    kind = "constrained-host"
    lasts = False

    def __post_init__(self) -> None:
        if self.target_score is not None and not 0 < self.target_score < math.inf:
            raise InputError("no score", field="score", value=self.target_score, allowed="more than 0")

    @property
    def name(self) -> str:
        """Such as `browser(pixel-8a, score=1500)`."""
        score = "not throttled" if self.target_score is None else f"score={self.target_score:g}"
        return f"browser({', '.join(filter(None, (self.device, score)))})"

    def default_engine(self, path: Path) -> str:
        engine = BROWSER_ENGINES.get(path.suffix.lower())
        if engine is None:
            allowed = ", ".join(BROWSER_ENGINES)
            raise InputError("no page runs such a file", field="file", value=str(path), allowed=allowed)
        return engine

    def require(self, engine: str) -> None:
        """See `Target`; whether the browser can be had shows in each run's result."""
        known = sorted(BROWSER_ENGINES.values())
        if engine not in known:
            raise InputError("runs in no browser", field="engine", value=engine, allowed=", ".join(known))

    def environment(self) -> Environment:
        """See `Target`; a page that is slowed down has one thread."""
        environment = describe_environment()
        return environment if self.target_score is None else replace(environment, cpus_usable=1)

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        """See `Target`: a browser of its own for every measurement."""
        path = Path(request.path)
        if self.default_engine(path) != request.engine:
            return WorkerResult(error=f"{request.engine} runs no {path.suffix} file in a browser")
        try:
            require_extra("playwright", "browser")
            payload = {
                "request": asdict(request),
                "executable": find_chromium(),
                "packages": str(fetch_packages()),
                "target_score": self.target_score,
                "throttling": asdict(self.throttling) if self.throttling else None,
            }
        except (PhonereadyError, OSError) as error:
            return WorkerResult(error=str(error))
        # Chromium's profile goes with the folder, however the browser ends.
        with tempfile.TemporaryDirectory(prefix="phoneready-browser-", ignore_cleanup_errors=True) as scratch:
            command = python_module("runtime_bench.browser.worker")
            result = measure_in(
                command, payload, timeout_s, environment={"TMPDIR": scratch}, metered=request.energy
            )
        self.throttling = self.throttling or result.throttling
        seen, why = result.conditions, "a browser's processes are not told from others"
        conditions = seen.hiding("others_cores", why) if seen else None
        return replace(result, contention=None, conditions=conditions)


RUNNER_ENGINE = "llama.cpp"
"""What the runner runs files in."""
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
EMULATED_RUNNER = "aarch64-linux"


@dataclass(frozen=True)
class Native(ThisMachine):
    """This machine as it is."""

    runner: Path  # The program, built for this machine

    name = "native"
    kind = "measured"

    @property
    def command(self) -> list[str]:
        """What measures."""
        return [str(self.runner)]

    def default_engine(self, path: Path) -> str:
        if path.suffix.lower() != ".gguf":
            raise InputError(f"{self.name} runs GGUF files", field="file", value=str(path), allowed=".gguf")
        return RUNNER_ENGINE

    def require(self, engine: str) -> None:
        if engine != RUNNER_ENGINE:
            why = f"{self.name} runs GGUF files"
            raise InputError(why, field="engine", value=engine, allowed=RUNNER_ENGINE)

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        return measure_in(self.command, asdict(request), timeout_s, metered=request.energy)

    def answer(self, request: AnswerRequest, timeout_s: float) -> AnswerResult:
        """See `runtime_bench.targets.Answering`."""
        try:
            return read_answer(AnswerResult, exchange(self.command, asdict(request), timeout_s))
        except ProcessFailed as error:
            return AnswerResult(error=str(error))


@dataclass(frozen=True)
class QemuAarch64(Native):
    """A runner for 64-bit Arm on this machine, its instructions translated by qemu-user.

    It shows that a file runs on Arm and what it answers there; how long that takes says nothing.
    """

    emulator: str  # The qemu program

    name = "qemu-aarch64"
    kind = EMULATED

    @property
    def command(self) -> list[str]:
        return [self.emulator, *super().command]

    def environment(self) -> Environment:
        """Of the machine that is emulated, which has no clock, no memory and no temperature."""
        shown = subprocess.run([self.emulator, "--version"], capture_output=True, text=True, check=False)
        first = next(iter(shown.stdout.splitlines()), "")
        versions = {"phoneready": tool_version(), "qemu": first.partition(" version ")[2] or "unknown"}
        environment = environment_of(
            {}, cpus_usable=default_threads(), platform="Linux-aarch64", versions=versions
        )
        return replace(environment, cpu_model="emulated by qemu-user")

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        """See `Target`. The memory would be the emulator's: it stays unknown."""
        result = super().run(request, timeout_s)
        return replace(result, baseline_rss_bytes=None, peak_rss_bytes=None)


def qemu_aarch64(progress: Progress = no_progress) -> QemuAarch64:
    """The target, with a runner that is built unless the cache has it. Raises InputError: no qemu-user, or
    the runner cannot be built."""
    emulator = next(filter(None, map(shutil.which, EMULATORS)), None)
    if emulator is None:
        raise InputError("qemu-aarch64 is not installed", field="on", allowed="Debian's package qemu-user")
    return QemuAarch64(build_runner(EMULATED_RUNNER, progress=progress), emulator)
