"""This machine, measured by the runner in place of Python: what other machines' numbers can be put beside."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from cfsp.errors import InputError
from cfsp.progress import Progress, no_progress
from runtime_bench.environment import describe_environment
from runtime_bench.native import build_runner
from runtime_bench.process import measure_in
from runtime_bench.records.bench_record import Environment
from runtime_bench.worker import WorkerRequest, WorkerResult

RUNNER_ENGINE = "llama.cpp"
"""What the runner runs files in."""


def runner_engine(path: Path, target: str) -> str:
    """The engine of a file where the runner measures.

    Raises:
        InputError: The runner does not run files of this kind.
    """
    if path.suffix.lower() != ".gguf":
        raise InputError(f"{target} runs GGUF files", field="file", value=str(path), allowed=".gguf")
    return RUNNER_ENGINE


def require_runner_engine(engine: str, target: str) -> None:
    """Check that the runner has an engine.

    Raises:
        InputError: It has not.
    """
    if engine != RUNNER_ENGINE:
        raise InputError(f"{target} runs GGUF files", field="engine", value=engine, allowed=RUNNER_ENGINE)


@dataclass(frozen=True)
class Native:
    """This machine as it is.

    Attributes:
        runner: The program, a build of `native`.
    """

    runner: Path

    name = "native"
    kind = "measured"
    memory_limit_bytes = None

    def default_engine(self, path: Path) -> str:
        """See `Target`."""
        return runner_engine(path, self.name)

    def require(self, engine: str) -> None:
        """See `Target`."""
        require_runner_engine(engine, self.name)

    def environment(self) -> Environment:
        """See `Target`."""
        return describe_environment()

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        """See `Target`."""
        return measure_in([str(self.runner)], asdict(request), timeout_s)


def native(progress: Progress = no_progress) -> Native:
    """The target, with a runner that is built where the cache has none.

    Raises:
        InputError: The runner cannot be built.
    """
    return Native(build_runner("native", progress=progress))
