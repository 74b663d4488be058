"""Where a measurement runs: a target runs one request and turns every way it can end into a result."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from runtime_bench.conditions.looks import look_here
from runtime_bench.engines import engine_for, engine_spec
from runtime_bench.environment import describe_environment
from runtime_bench.process import run_worker
from runtime_bench.records.bench_record import Environment
from runtime_bench.records.reported import Conditions
from runtime_bench.worker import AnswerRequest, AnswerResult, WorkerRequest, WorkerResult

__all__ = ["LOCAL", "Answering", "Local", "Target", "ThisMachine"]


class Target(Protocol):
    """A place to measure.

    Attributes:
        name: As records have it.
        kind: What its numbers are, of runtime_bench.records.bench_record.KINDS.
        memory_limit_bytes: What a run may use; None if nothing limits it.
        lasts: Whether samples can be taken for a given time there.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def memory_limit_bytes(self) -> int | None: ...

    @property
    def lasts(self) -> bool: ...

    def default_engine(self, path: Path) -> str:
        """The engine that runs a file there unless another one is asked for; raises InputError if none does."""
        ...

    def require(self, engine: str) -> None:
        """Check before anything is measured that it can be measured in this engine there. Raises
        PhonereadyError: unknown engine, one that is not installed, or one that never runs there."""
        ...

    def environment(self) -> Environment:
        """The machine that is measured, as it is now; what it does not tell is None."""
        ...

    def conditions(self) -> Conditions:
        """One look at the machine, as it is now; what it does not tell says why."""
        ...

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        """Measure in a fresh process; a failure is a result whose `error` says what happened."""
        ...


@runtime_checkable
class Answering(Protocol):
    """A target whose engines can be asked about texts; not all can."""

    def answer(self, request: AnswerRequest, timeout_s: float) -> AnswerResult:
        """Answer in a fresh process; a failure is a result whose `error` says what happened."""
        ...


class ThisMachine:
    """What targets on this machine have in common; members are those of `Target`."""

    memory_limit_bytes: int | None = None
    lasts = True

    def default_engine(self, path: Path) -> str:
        return engine_for(path)

    def require(self, engine: str) -> None:
        engine_spec(engine).require()

    def environment(self) -> Environment:
        return describe_environment()

    def conditions(self) -> Conditions:
        return look_here()


class Local(ThisMachine):
    """This machine as it is."""

    name = "local"
    kind = "measured"

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        return run_worker(request, timeout_s)


LOCAL = Local()
