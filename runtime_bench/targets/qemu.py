"""A runner for 64-bit Arm on this machine, its instructions translated by qemu-user.

It shows that a file runs on Arm and what it answers there; how long that takes says nothing.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cfsp.errors import InputError
from cfsp.progress import Progress, no_progress
from cfsp.records import tool_version
from runtime_bench.native import build_runner
from runtime_bench.process import measure_in
from runtime_bench.records.bench_record import Environment
from runtime_bench.targets.native import require_runner_engine, runner_engine
from runtime_bench.worker import WorkerRequest, WorkerResult
from runtime_bench.workload import default_threads

EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
RUNNER = "aarch64-linux"


@dataclass(frozen=True)
class QemuAarch64:
    """64-bit Arm, emulated: function only.

    Attributes:
        emulator: The qemu program.
        runner: The program that it runs, a build of RUNNER.
    """

    emulator: str
    runner: Path

    name = "qemu-aarch64"
    kind = "emulated"
    memory_limit_bytes = None

    @property
    def command(self) -> list[str]:
        """What the runner is started with."""
        return [self.emulator, str(self.runner)]

    def default_engine(self, path: Path) -> str:
        """See `Target`."""
        return runner_engine(path, self.name)

    def require(self, engine: str) -> None:
        """See `Target`."""
        require_runner_engine(engine, self.name)

    def environment(self) -> Environment:
        """See `Target`: of the machine that is emulated, which has no clock, no memory and no temperature."""
        shown = subprocess.run([self.emulator, "--version"], capture_output=True, text=True, check=False)
        first = next(iter(shown.stdout.splitlines()), "")
        return Environment(
            cpu_model="emulated by qemu-user",
            cpus_usable=default_threads(),
            governor=None,
            load_average=None,
            memory_bytes=None,
            platform="Linux-aarch64",
            versions={"phoneready": tool_version(), "qemu": first.partition(" version ")[2] or "unknown"},
        )

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        """See `Target`. The memory would be the emulator's: it stays unknown."""
        result = measure_in(self.command, asdict(request), timeout_s)
        return replace(result, baseline_rss_bytes=None, peak_rss_bytes=None)


def qemu_aarch64(progress: Progress = no_progress) -> QemuAarch64:
    """The target, with a runner that is built where the cache has none.

    Raises:
        InputError: No qemu-user, or the runner cannot be built.
    """
    found = next(filter(None, map(shutil.which, EMULATORS)), None)
    if found is None:
        raise InputError("qemu-aarch64 is not installed", field="on", allowed="Debian's package qemu-user")
    return QemuAarch64(found, build_runner(RUNNER, progress=progress))
