"""Another machine as a target: what is needed is pushed there once, by content, and a program there measures.

Nothing of a run passes the connection but one line with the request and one with the result, before and after the
clock runs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean

from cfsp.errors import InputError, PhonereadyError
from cfsp.progress import Progress, no_progress
from cfsp.records import tool_version
from runtime_bench.conditions.energy import energy_of
from runtime_bench.conditions.looks import conditions_of
from runtime_bench.conditions.script import WATCH
from runtime_bench.engines import check_engine, engine_for
from runtime_bench.process import ProcessFailed, exit_reason, read_answer, result_from_json
from runtime_bench.questions import AnswerRequest, AnswerResult
from runtime_bench.records.bench_record import EMULATED, Environment
from runtime_bench.records.reported import Conditions, Contention, unknown_conditions
from runtime_bench.targets.bundle import model_bundle, plain_bundle
from runtime_bench.targets.far_machine import ANSWER_S, UNKNOWN, Machine, describe
from runtime_bench.targets.far_programs import native_program, python_program
from runtime_bench.targets.far_scripts import LOOKS_FOLLOW, RUN
from runtime_bench.targets.native import RUNNER_ENGINE
from runtime_bench.targets.remote_cache import RemoteCache
from runtime_bench.targets.transport import (
    FarError,
    FarShell,
    Reply,
    StoppedError,
    Transport,
    UnreachableError,
)
from runtime_bench.worker import WorkerRequest, WorkerResult

logger = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 30.0
"""Before a connection is tried again; each time it fails twice as long."""
_GRACE_S = 30.0
"""What a connection may take, beside the run itself."""
_NO_PROC = "nothing could be written there, or read of /proc"
_CANNOT_EXECUTE = 126
"""Status of a shell whose command is there but cannot be run."""


@dataclass
class _Connection:
    """A machine that answered, and what was found or put there since."""

    machine: Machine
    cache: RemoteCache
    programs: dict[str, list[str] | PhonereadyError] = field(default_factory=dict)


@dataclass
class Remote:
    """A machine behind a transport; see `runtime_bench.targets.Target`.

    Raises:
        InputError: A folder that is not absolute, or has control characters in its name.
    """

    transport: Transport
    _: KW_ONLY
    runner: Path | None = None  # Native program to measure with, instead of the one that is built here
    ndk: Path | None = None  # Folder of the Android NDK, to build one for Android with
    folder: str | None = None  # Where to put files there, absolute; None for the transport's
    retries: int = 0  # How often, in all, a connection that broke or could not be made is tried again
    progress: Progress = no_progress  # Told what is built and pushed
    _shell: FarShell = field(init=False, repr=False)
    _left: int = field(init=False, repr=False)
    _open: _Connection | None = field(default=None, init=False, repr=False)
    _problem: FarError | None = field(default=None, init=False, repr=False)
    _waited_s: float = field(default=0.0, init=False, repr=False)

    memory_limit_bytes = None
    pushes = True
    lasts = True

    def __post_init__(self) -> None:
        if self.folder is not None and not (self.folder.startswith("/") and self.folder.isprintable()):
            raise InputError("not an absolute path in one line", field="--remote-folder", value=self.folder)
        self._shell, self._left = FarShell(self.transport), self.retries

    @property
    def name(self) -> str:
        """As records have it."""
        return self.transport.name

    @property
    def kind(self) -> str:
        """See `Target`; known once it has answered."""
        return EMULATED if self._open is not None and self._open.machine.is_emulator else "measured"

    def default_engine(self, path: Path) -> str:
        """See `Target`."""
        return engine_for(path)

    def require(self, engine: str) -> None:
        """See `Target`. Whether the machine has the engine, a run finds out, so that other rows go on."""
        if not check_engine(engine).far_packages and engine != RUNNER_ENGINE:
            raise InputError("runs on no other machine", field="engine", value=engine, allowed="--on local")

    def environment(self) -> Environment:
        """See `Target`. It connects; a machine that does not answer is unknown, and runs on it say why.

        One that has kept us waiting for a minute in all is not asked again.
        """
        nothing = Environment(None, None, None, None, None, UNKNOWN, {"phoneready": tool_version()})
        if self._waited_s >= ANSWER_S:
            return nothing
        began = time.monotonic()
        try:
            machine = describe(self._shell, self.folder or self.transport.folder)
        except FarError as error:
            self._waited_s += time.monotonic() - began
            self._open, self._problem = None, self._named(error)
            return nothing
        if self._open is None:
            # Whoever is told may be another one by then.
            cache = RemoteCache(self._shell, machine.folder, lambda *step: self.progress(*step))
            self._open = _Connection(machine, cache)
        return machine.environment

    def conditions(self) -> Conditions:
        """See `Target`. A machine that does not answer is told of by the run that follows."""
        try:
            reply = self._shell.run(WATCH, "", timeout_s=ANSWER_S)
        except FarError as error:
            return unknown_conditions(f"{self.name}: {error}")
        return conditions_of(reply.text, why=_NO_PROC)

    def forget(self, path: Path) -> None:
        """See `Target`."""
        self._connection().cache.forget(path, model_bundle)

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        """See `Target`; what is missing there is pushed first.

        Raises:
            StoppedError: After `stop`.
        """

        def asked(link: _Connection) -> WorkerRequest:
            return replace(request, path=link.cache.have(Path(request.path), model_bundle))

        try:
            reply = self._ask(request.engine, asked, timeout_s, metered=request.energy)
            return _result_of(reply, metered=request.energy)
        except StoppedError:
            raise
        except PhonereadyError as error:
            return WorkerResult(error=str(error))

    def answer(self, request: AnswerRequest, timeout_s: float) -> AnswerResult:
        """See `runtime_bench.targets.Answering`; the questions are pushed for it, and removed after it.

        Raises:
            StoppedError: After `stop`.
        """
        questions = Path(request.questions)

        def asked(link: _Connection) -> AnswerRequest:
            model = link.cache.have(Path(request.path), model_bundle)
            return replace(request, path=model, questions=link.cache.have(questions, plain_bundle))

        try:
            reply = self._ask(request.engine, asked, timeout_s)
            return read_answer(AnswerResult, _answer_of(reply)[0])
        except StoppedError:
            raise
        except (PhonereadyError, ProcessFailed) as error:
            return AnswerResult(error=str(error))
        finally:
            # What cannot be removed now, `devices clean` removes.
            with contextlib.suppress(FarError, StoppedError):
                if self._open is not None:
                    self._open.cache.forget(questions, plain_bundle)

    def _ask(
        self,
        engine: str,
        asked: Callable[[_Connection], WorkerRequest | AnswerRequest],
        timeout_s: float,
        *,
        metered: bool = False,
    ) -> Reply:
        """Have a program there answer a request, once more where the connection breaks and may be tried again.

        Raises:
            PhonereadyError: It does not; the text names the target where that is what fails.
        """
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return self._asked_once(engine, asked, timeout_s, metered)
            except UnreachableError as error:
                # What is there has to be looked for again, should it come back.
                self._open, self._problem = None, self._named(error)
                if self._left <= 0:
                    raise self._problem from None
            self._left -= 1
            logger.warning("%s; tried again in %g s", self._problem, pause_s)
            self._shell.pause(pause_s)
            self._problem, self._waited_s, pause_s = None, 0.0, min(2 * pause_s, _LONGEST_PAUSE_S)

    def _asked_once(
        self,
        engine: str,
        asked: Callable[[_Connection], WorkerRequest | AnswerRequest],
        timeout_s: float,
        metered: bool,
    ) -> Reply:
        link = self._connection()
        command = self._program(engine, link)
        line, place = json.dumps(asdict(asked(link))), link.machine.folder
        meters = "metered" if metered else ""
        reply = self._shell.run(RUN, place, meters, *command, line=line, timeout_s=timeout_s + _GRACE_S)
        if reply.status == _CANNOT_EXECUTE:
            raise FarError(
                f"the runner cannot be executed in {place}; name a folder that allows it: --remote-folder"
            )
        if reply.status:
            raise FarError(exit_reason(reply.status, reply.errors))
        return reply

    def clean(self) -> int:
        """Remove all that was ever pushed there, and return how many files and programs that was.

        Raises:
            FarError: It cannot be reached, or something cannot be removed.
        """
        shell = FarShell(self.transport)  # one that `stop` did not stop
        try:
            machine = describe(shell, self.folder or self.transport.folder)
            removed = RemoteCache(shell, machine.folder).clean()
        except FarError as error:
            raise FarError(f"{self.name}: {error}") from error
        self._open = None
        return removed

    def stop(self) -> None:
        """End what runs there; `run`, in whatever thread, raises StoppedError."""
        self._shell.stop()

    def _named(self, error: FarError) -> FarError:
        """An error that says which machine it is about."""
        prefix = f"{self.name}: "
        return error if str(error).startswith(prefix) else type(error)(f"{prefix}{error}")

    def _connection(self) -> _Connection:
        if self._open is None and self._problem is None:
            self.environment()
        if self._open is None:
            raise self._problem or FarError(f"{self.name} does not answer")
        return self._open

    def _program(self, engine: str, link: _Connection) -> list[str]:
        """The program that measures, with its arguments. A failure is remembered: finding out takes minutes."""
        if engine not in link.programs:
            try:
                link.programs[engine] = self._found(engine, link)
            except (StoppedError, UnreachableError):
                raise
            except PhonereadyError as error:
                link.programs[engine] = error
        program = link.programs[engine]
        if isinstance(program, PhonereadyError):
            raise program
        return program

    def _found(self, engine: str, link: _Connection) -> list[str]:
        if engine != RUNNER_ENGINE:
            return python_program(engine, self._shell, link.machine, link.cache)
        return native_program(
            link.machine, link.cache, runner=self.runner, ndk=self.ndk, progress=self.progress
        )


def _answer_of(reply: Reply) -> tuple[bytes, bytes]:
    """The last line that the program wrote, and the looks at the machine that follow."""
    output, _, looks = reply.output.partition(f"\n{LOOKS_FOLLOW}\n".encode())
    return output.strip().rpartition(b"\n")[2], looks


def _result_of(reply: Reply, *, metered: bool) -> WorkerResult:
    """What the program answered, and what the machine went through meanwhile."""
    output, looks = _answer_of(reply)
    result, text = result_from_json(output), looks.decode("utf-8", "replace")
    conditions = conditions_of(text, result.spans_ns, _NO_PROC)
    energy = energy_of(text, result.spans_ns, conditions) if metered else None
    return replace(result, conditions=conditions, contention=_contention_of(conditions), energy=energy)


def _contention_of(conditions: Conditions) -> Contention | None:
    """What else used the cores between the looks; None where they do not tell."""
    others, stolen = (
        [value for _, value in conditions.during_samples(n)] for n in ("others_cores", "stolen_cores")
    )
    return Contention(fmean(others), fmean(stolen)) if others and stolen else None
