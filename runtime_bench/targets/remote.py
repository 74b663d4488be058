"""Another machine as a target: what is needed is pushed there once, by content, and a program there measures.

Nothing of a run passes the connection but one line with the request and one with the result, before and after the
clock runs.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean

from cfsp.errors import InputError, PhonereadyError
from cfsp.models.builtin import cache_directory
from cfsp.progress import Progress, no_progress
from cfsp.records import tool_version
from runtime_bench.conditions.looks import conditions_of
from runtime_bench.conditions.meters.energy import energy_of
from runtime_bench.conditions.script import WATCH, idle_glances
from runtime_bench.engines import check_engine, engine_for, engine_spec
from runtime_bench.native.build import build_runner
from runtime_bench.process import exit_reason, result_from_json
from runtime_bench.records.bench_record import Environment
from runtime_bench.records.conditions import Conditions, nothing_known
from runtime_bench.records.contention import Contention
from runtime_bench.targets.bundle import model_bundle, pack_worker, program_bundle, program_machine
from runtime_bench.targets.far_machine import ANSWER_S, UNKNOWN, Machine, describe
from runtime_bench.targets.far_scripts import HAVE_PACKAGES, LOOKS_FOLLOW, RUN
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

_GRACE_S = 30.0
"""What a connection may take, beside the run itself."""
_PYTHON = "python3"
_NO_PROC = "nothing could be written there, or read of /proc"
_BUILDING = threading.Lock()
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

    Attributes:
        transport: The way there.
        runner: Native program to measure with, instead of the one that is built here.
        ndk: Folder of the Android NDK, to build one for Android with.
        folder: Where to put files there, absolute; None for the transport's.
        progress: Told what is built and pushed.

    Raises:
        InputError: A folder that is not absolute, or has control characters in its name.
    """

    transport: Transport
    _: KW_ONLY
    runner: Path | None = None
    ndk: Path | None = None
    folder: str | None = None
    progress: Progress = no_progress
    _shell: FarShell = field(init=False, repr=False)
    _open: _Connection | None = field(default=None, init=False, repr=False)
    _problem: str = field(default="", init=False, repr=False)
    _waited_s: float = field(default=0.0, init=False, repr=False)

    kind = "measured"
    memory_limit_bytes = None
    pushes = True
    lasts = True

    def __post_init__(self) -> None:
        if self.folder is not None and not (self.folder.startswith("/") and self.folder.isprintable()):
            raise InputError("not an absolute path in one line", field="--remote-folder", value=self.folder)
        self._shell = FarShell(self.transport)

    @property
    def name(self) -> str:
        """As records have it."""
        return self.transport.name

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
            self._open, self._problem = None, f"{self.name}: {error}"
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
            return nothing_known(f"{self.name}: {error}")
        return conditions_of(reply.text, why=_NO_PROC)

    def forget(self, path: Path) -> None:
        """See `Target`."""
        self._connection().cache.forget(path, model_bundle)

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        """See `Target`; what is missing there is pushed first.

        Raises:
            StoppedError: After `stop`.
        """
        if request.session.cache_type is not None and engine_spec(request.engine).companion:
            made = f"a cache of {request.session.cache_type} needs what is made of the file on this machine alone"
            return WorkerResult(error=f"{made}; allowed: --on local")
        try:
            link = self._connection()
            command = self._program(request.engine, link)
            path = link.cache.have(Path(request.path), model_bundle)
            line = json.dumps(asdict(replace(request, path=path)))
            idle = "" if request.idle_s is None else idle_glances(request.idle_s)
            allowed_s = timeout_s + (request.idle_s or 0.0) + _GRACE_S
            reply = self._shell.run(RUN, link.machine.folder, idle, *command, line=line, timeout_s=allowed_s)
        except StoppedError:
            raise
        except UnreachableError as error:
            # What is there has to be looked for again, should it come back.
            self._open, self._problem = None, f"{self.name}: {error}"
            return WorkerResult(error=self._problem)
        except PhonereadyError as error:
            return WorkerResult(error=str(error))
        if reply.status == _CANNOT_EXECUTE:
            place = link.machine.folder
            why = f"the runner cannot be executed in {place}; name a folder that allows it: --remote-folder"
            return WorkerResult(error=why)
        if reply.status:
            return WorkerResult(error=exit_reason(reply.status, reply.errors))
        return _result_of(reply, metered=request.idle_s is not None)

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

    def _connection(self) -> _Connection:
        if self._open is None and not self._problem:
            self.environment()
        if self._open is None:
            raise FarError(self._problem)
        return self._open

    def _program(self, engine: str, link: _Connection) -> list[str]:
        """The program that measures, with its arguments. A failure is remembered: finding out takes minutes."""
        if engine not in link.programs:
            try:
                link.programs[engine] = (_native if engine == RUNNER_ENGINE else _python)(self, engine, link)
            except (StoppedError, UnreachableError):
                raise
            except PhonereadyError as error:
                link.programs[engine] = error
        program = link.programs[engine]
        if isinstance(program, PhonereadyError):
            raise program
        return program


def _result_of(reply: Reply, *, metered: bool) -> WorkerResult:
    """What the program answered, and what the machine went through meanwhile."""
    output, _, looks = reply.output.partition(f"\n{LOOKS_FOLLOW}\n".encode())
    result = result_from_json(output.strip().rpartition(b"\n")[2])
    text = looks.decode("utf-8", "replace")
    conditions = conditions_of(text, result.spans_ns, _NO_PROC)
    energy = energy_of(text, result.spans_ns, conditions) if metered else None
    return replace(result, conditions=conditions, contention=_contention_of(conditions), energy=energy)


def _contention_of(conditions: Conditions) -> Contention | None:
    """What else used the cores between the looks; None where they do not tell."""
    others, stolen = ([value for _, value in conditions.told(n)] for n in ("others_cores", "stolen_cores"))
    return Contention(fmean(others), fmean(stolen)) if others and stolen else None


def _native(remote: Remote, engine: str, link: _Connection) -> list[str]:
    """The runner for the machine, given or built here."""
    runner = remote.runner
    if runner is None:
        target = link.machine.runner
        ndk = remote.ndk if target.startswith("android") else None
        with _BUILDING:
            runner = build_runner(target, ndk=ndk, progress=remote.progress)
    made_for = program_machine(runner)
    if made_for and made_for != link.machine.machine:
        raise FarError(f"wrong ABI: {runner.name} is for {made_for}, the device is {link.machine.machine}")
    return [link.cache.have(runner, program_bundle)]


def _python(remote: Remote, engine: str, link: _Connection) -> list[str]:
    """The worker that measures here, in a Python there."""
    if link.machine.abi:
        raise FarError(f"{engine} needs Python there, which Android does not have; measure a GGUF file")
    reply = remote._shell.run(HAVE_PACKAGES, _PYTHON, *engine_spec(engine).far_packages, timeout_s=ANSWER_S)
    if reply.status:
        raise FarError(f"{engine} needs Python there, and there is no {_PYTHON}")
    lacking = reply.text.strip().rpartition("\n")[2].split()
    if lacking:
        what = "3.11 or newer" if "python" in lacking else f"with {', '.join(lacking)}"
        raise FarError(f"{engine} needs a {_PYTHON} {what} there")
    packed = cache_directory() / "worker.zip"
    with _BUILDING:
        pack_worker(packed)
    path = link.cache.have(packed, program_bundle)
    return ["env", f"PYTHONPATH={path}", _PYTHON, "-P", "-m", "runtime_bench.worker"]
