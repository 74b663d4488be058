"""The runner in place of Python on this machine: as it is, or under an emulator of another processor."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cfsp.errors import InputError
from cfsp.progress import Progress, no_progress
from cfsp.records import tool_version
from runtime_bench.environment import environment_of
from runtime_bench.native.build import build_runner
from runtime_bench.process import ProcessFailed, exchange, measure_in, read_answer
from runtime_bench.records.bench_record import EMULATED, Environment
from runtime_bench.targets import ThisMachine
from runtime_bench.worker import AnswerRequest, AnswerResult, WorkerRequest, WorkerResult
from runtime_bench.workload import default_threads

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
    """The target, with a runner that is built unless the cache has it.

    Raises:
        InputError: No qemu-user, or the runner cannot be built.
    """
    emulator = next(filter(None, map(shutil.which, EMULATORS)), None)
    if emulator is None:
        raise InputError("qemu-aarch64 is not installed", field="on", allowed="Debian's package qemu-user")
    return QemuAarch64(build_runner(EMULATED_RUNNER, progress=progress), emulator)
