"""Another machine as a target: what is needed is pushed there once, by content, and a program there measures.

Nothing of a run passes the connection but one line with the request and one with the result, before and after the
clock runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean

from cfsp.errors import InputError, PhonereadyError
from cfsp.files import atomic_file, sha256_file
from cfsp.models.builtin import cache_directory
from cfsp.progress import Progress, no_progress
from cfsp.records import tool_version
from exporters.onnx.folder import folder_of
from runtime_bench.conditions.energy import energy_of
from runtime_bench.conditions.looks import conditions_of
from runtime_bench.conditions.script import WATCH
from runtime_bench.engines import check_engine, engine_for, engine_spec
from runtime_bench.environment import environment_of
from runtime_bench.files import files_of
from runtime_bench.native.build import build_runner
from runtime_bench.native.targets import cpu_features, runner_target_for
from runtime_bench.process import ProcessFailed, exit_reason, read_answer, result_from_json
from runtime_bench.questions import AnswerRequest, AnswerResult
from runtime_bench.records.bench_record import EMULATED, Environment
from runtime_bench.records.reported import Conditions, Contention, unknown_conditions
from runtime_bench.targets.far_scripts import (
    CHECK,
    CLEAN,
    DESCRIBE,
    FACTS_FOLLOW,
    FORGET,
    HAVE_PACKAGES,
    LOOKS_FOLLOW,
    MISMATCH,
    PUSH,
    RUN,
)
from runtime_bench.targets.native import RUNNER_ENGINE
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
ANSWER_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 30.0
"""Before a connection is tried again; each time it fails twice as long."""
_GRACE_S = 30.0
"""What a connection may take, beside the run itself."""
_HASHED_PER_S = 4 * 2**20
"""Bytes that the slowest of boards reads from its card and hashes in a second, beside other work."""
_STALL_S = 60.0
"""A client that takes nothing more of a file for so long has lost its device."""
_NO_SPACE = ("No space left", "quota exceeded")
_NO_PROC = "nothing could be written there, or read of /proc"
_CANNOT_EXECUTE = 126
"""Status of a shell whose command is there but cannot be run."""
_UNKNOWN, _PYTHON = "unknown", "python3"
_COMPANIONS = (".json", ".jinja", ".model", ".txt")
"""Small files of a variant's folder: tokenizer, configurations."""
_PACKAGES = ("cfsp", "exporters", "runtime_bench")
_MACHINES = {3: "i686", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
"""e_machine of the ELF header, as `uname -m` calls it."""
_ABIS = {"arm64-v8a": "aarch64"}
"""Android's names of instruction sets that have another one."""
_BUILDING = threading.Lock()


@dataclass(frozen=True)
class BundledFile:
    """A file of those that lie together in one folder there, which is named by their content."""

    path: Path
    place: str  # there, below the folder for all that is pushed: the bundle's folder and its name in that
    sha256: str
    size_bytes: int


Bundle = tuple[BundledFile, ...]
"""The first is the one that is named to the engine."""


def model_bundle(path: Path) -> Bundle:
    """A model file; for ONNX with its weights and its variant's tokenizer and configurations.

    Raises:
        InputError: A file is not there, or cannot be read.
    """
    if path.suffix.lower() != ".onnx":
        return _bundle([(path, f"model{path.suffix.lower()}")])
    folder = folder_of(path)
    companions = sorted(file for file in folder.iterdir() if file.suffix in _COMPANIONS and file.is_file())
    place = "" if folder == path.resolve().parent else f"{path.resolve().parent.name}/"
    graphs = [(file, place + file.name) for file in files_of(path)]
    return _bundle([*graphs, *((file, file.name) for file in companions)])


def plain_bundle(path: Path) -> Bundle:
    """A file that nothing belongs to."""
    return _bundle([(path, path.name)])


def program_bundle(path: Path) -> Bundle:
    """A program, or the packed worker."""
    return _bundle([(path, "worker.zip" if path.suffix == ".zip" else "runner")])


def _bundle(files: Sequence[tuple[Path, str]]) -> Bundle:
    """The folder is the file's SHA-256, or of several files the SHA-256 of names and sums."""
    try:
        sums = [sha256_file(path) for path, _ in files]
        sizes = [path.stat().st_size for path, _ in files]
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from error
    listing = "".join(f"{digest}  {name}\n" for digest, (_, name) in zip(sums, files, strict=True))
    folder = sums[0] if len(sums) == 1 else hashlib.sha256(listing.encode()).hexdigest()
    return tuple(
        BundledFile(path, f"{folder}/{name}", digest, size)
        for (path, name), digest, size in zip(files, sums, sizes, strict=True)
    )


def program_machine(path: Path) -> str | None:
    """Processor that a program is for, as `uname -m` has it; None for scripts and what is not known.

    Raises:
        InputError: It cannot be read.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(20)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return None
    return _MACHINES.get(int.from_bytes(head[18:20], "little"))


def pack_worker(path: Path) -> None:
    """Write the packages that the measuring worker needs as a zip file that Python imports from.

    The same sources give the same bytes, so that it is pushed once.
    """
    root = Path(__file__).resolve().parents[2]
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for package in _PACKAGES:
            for file in sorted((root / package).rglob("*.py")):
                entry = zipfile.ZipInfo(file.relative_to(root).as_posix(), (1980, 1, 1, 0, 0, 0))
                archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)


@dataclass(frozen=True)
class Machine:
    """A machine that answered."""

    folder: str  # for pushed files, absolute
    system: str  # the kernel's name
    machine: str  # instruction set, as the kernel calls it
    abi: str  # Android's name of that; empty elsewhere
    features: frozenset[str]  # that its processor names
    environment: Environment  # for records
    is_emulator: bool = False  # Android's, which takes the time of whatever machine it runs on


def describe(shell: FarShell, folder: str) -> Machine:
    """Connect and ask; files shall go to `folder`, if that is empty to one under the home there.

    Raises:
        FarError: No connection, or no sensible answer.
    """
    reply = shell.run(DESCRIBE, folder, timeout_s=ANSWER_S)
    facts: dict[str, str] = {}
    texts: dict[str, list[str]] = {}
    for line in reply.text.partition(f"{FACTS_FOLLOW}\n")[2].splitlines():
        path, colon, content = line.partition(":")
        if line.startswith("/") and colon:
            texts.setdefault(path, []).append(content)
        else:
            name, _, value = line.partition("=")
            facts[name] = value.strip()
    if not facts.get("folder", "").startswith("/") or not facts.get("machine"):
        raise FarError("its shell does not say what machine it is")
    files = {path: "\n".join(lines) for path, lines in texts.items()}
    cores, android, system = facts.get("cores", ""), facts.get("android", ""), facts.get("system", _UNKNOWN)
    platform = f"{system} {facts.get('release', _UNKNOWN)} {facts['machine']}"
    if android:
        platform += f", Android {android}, {facts.get('device', _UNKNOWN)}"
    return Machine(
        # As it was asked for: only what the shell there chose itself has to be read back.
        folder=folder or facts["folder"],
        system=system,
        machine=facts["machine"],
        abi=facts.get("abi", ""),
        features=cpu_features(files.get("/proc/cpuinfo", "")),
        environment=environment_of(
            files,
            cpu_name=facts.get("soc") or None,
            cpus_usable=int(cores) if cores.isdecimal() else None,
            platform=platform,
            versions={"phoneready": tool_version()} | ({"android": android} if android else {}),
        ),
        is_emulator="1" in facts.get("emulator", ""),
    )


@dataclass
class RemoteCache:
    """The folder there that files are pushed to: each once, under its content's name, whole or not at all."""

    shell: FarShell
    folder: str  # absolute
    progress: Progress = no_progress
    _there: dict[Path, str] = field(default_factory=dict, init=False, repr=False)

    def have(self, path: Path, bundle_of: Callable[[Path], Bundle]) -> str:
        """Have a file and what belongs to it there, checked by its sum; returns its path there.

        Raises:
            FarError: No space, no such folder, no connection, or a file that does not arrive as it was sent.
            InputError: A file here cannot be read.
        """
        if path in self._there:
            return self._there[path]
        bundle = bundle_of(path)
        words = [word for file in bundle for word in (f"{self.folder}/{file.place}", file.sha256)]
        hashing_s = sum(file.size_bytes for file in bundle) / _HASHED_PER_S
        reply = self.shell.run(CHECK, *words, timeout_s=ANSWER_S + hashing_s)
        if reply.status:
            raise FarError("there is no sha256sum, without which nothing can be verified")
        answers = [word for word in reply.text.split() if word in ("same", "other")][-len(bundle) :]
        if len(answers) != len(bundle):
            raise FarError("it does not say which files it has")
        for file, answer in zip(bundle, answers, strict=True):
            if answer == "other":
                self._push(file)
        self._there[path] = f"{self.folder}/{bundle[0].place}"
        return self._there[path]

    def forget(self, path: Path, bundle_of: Callable[[Path], Bundle]) -> None:
        """Remove a file and what belongs to it there.

        Raises:
            FarError: No connection, or it cannot be removed.
            InputError: A file here cannot be read.
        """
        folders = sorted({file.place.partition("/")[0] for file in bundle_of(path)})
        reply = self.shell.run(FORGET, *(f"{self.folder}/{name}" for name in folders), timeout_s=ANSWER_S)
        self._there.pop(path, None)
        if reply.status:
            raise reply.reason(f"removing {path.name}")

    def clean(self) -> int:
        """Remove all that was ever pushed there, and return how many folders that was.

        Raises:
            FarError: No connection, or something cannot be removed.
        """
        reply = self.shell.run(CLEAN, self.folder, timeout_s=ANSWER_S)
        self._there.clear()
        if reply.status:
            raise reply.reason("removing files")
        return sum(line.startswith("removed ") for line in reply.text.splitlines())

    def _push(self, file: BundledFile) -> None:
        size, name = file.size_bytes, file.path.name

        def report(done: int) -> None:
            # The step ends when all is over: what was taken last is still being checked there.
            self.progress("pushing", min(done, size - 1), size)

        report(0)
        try:
            reply = self.shell.run(
                PUSH,
                f"{self.folder}/{file.place}",
                file.sha256,
                timeout_s=_STALL_S,
                file=file.path,
                after_s=size / _HASHED_PER_S,
                on_bytes=report,
            )
        except OSError as error:
            raise FarError(f"cannot read {file.path}: {error.strerror}") from error
        finally:
            self.progress("pushing", size, size)
        if reply.status == MISMATCH:
            raise FarError(f"{name} did not arrive as it was sent, or was changed meanwhile")
        if any(mark in line for mark in _NO_SPACE for line in reply.errors):
            raise FarError(f"no space left there for {name} ({size / 2**20:.1f} MiB) in {self.folder}")
        if reply.status:
            raise reply.reason(f"pushing {name}")


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
            raise InputError("not an absolute path in one line", field="folder", value=self.folder)
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
        nothing = Environment(None, None, None, None, None, _UNKNOWN, {"phoneready": tool_version()})
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

        `asked` makes the request when what it names has been pushed.

        Raises:
            PhonereadyError: It does not; the text names the target where that is what fails.
        """
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                link = self._connection()
                command = self._program(engine, link)
                line, place = json.dumps(asdict(asked(link))), link.machine.folder
                meters = "metered" if metered else ""
                reply = self._shell.run(
                    RUN, place, meters, *command, line=line, timeout_s=timeout_s + _GRACE_S
                )
                break
            except UnreachableError as error:
                # What is there has to be looked for again, should it come back.
                self._open, self._problem = None, self._named(error)
                if self._left <= 0:
                    raise self._problem from None
            self._left -= 1
            logger.warning("%s; tried again in %g s", self._problem, pause_s)
            self._shell.pause(pause_s)
            self._problem, self._waited_s, pause_s = None, 0.0, min(2 * pause_s, _LONGEST_PAUSE_S)
        if reply.status == _CANNOT_EXECUTE:
            raise FarError(
                f"the runner cannot be executed in {place}; name a folder that allows it: {self.name},folder=DIR"
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
        machine = link.machine
        if engine == RUNNER_ENGINE:
            runner = self.runner
            if runner is None:
                # An Android on a PC's processor, an emulator's mostly, runs Linux's static programs.
                kind = _ABIS.get(machine.abi, machine.abi) or machine.machine
                system = "android" if machine.abi and kind != "x86_64" else machine.system.lower()
                target = runner_target_for(system, kind, machine.features)
                ndk = self.ndk if target.startswith("android") else None
                with _BUILDING:
                    runner = build_runner(target, ndk=ndk, progress=self.progress)
            made_for = program_machine(runner)
            if made_for and made_for != machine.machine:
                raise FarError(f"wrong ABI: {runner.name} is for {made_for}, the device is {machine.machine}")
            return [link.cache.have(runner, program_bundle)]
        if machine.abi:
            raise FarError(f"{engine} needs Python there, which Android does not have; measure a GGUF file")
        packages = engine_spec(engine).far_packages
        reply = self._shell.run(HAVE_PACKAGES, _PYTHON, *packages, timeout_s=ANSWER_S)
        if reply.status:
            raise FarError(f"{engine} needs Python there, and there is no {_PYTHON}")
        if lacking := reply.text.strip().rpartition("\n")[2].split():
            what = "3.11 or newer" if "python" in lacking else f"with {', '.join(lacking)}"
            raise FarError(f"{engine} needs a {_PYTHON} {what} there")
        packed = cache_directory() / "worker.zip"
        with _BUILDING:
            pack_worker(packed)
        path = link.cache.have(packed, program_bundle)
        return ["env", f"PYTHONPATH={path}", _PYTHON, "-P", "-m", "runtime_bench.worker"]


def _answer_of(reply: Reply) -> tuple[bytes, bytes]:
    """The last line that the program wrote, and the samples of conditions that follow."""
    output, _, looks = reply.output.partition(f"\n{LOOKS_FOLLOW}\n".encode())
    return output.strip().rpartition(b"\n")[2], looks


def _result_of(reply: Reply, *, metered: bool) -> WorkerResult:
    """What the program answered, and what the machine went through meanwhile."""
    output, looks = _answer_of(reply)
    result, text = result_from_json(output), looks.decode("utf-8", "replace")
    seen = conditions_of(text, result.spans_ns, _NO_PROC)
    energy = energy_of(text, result.spans_ns, seen) if metered else None
    others, stolen = ([v for _, v in seen.during_samples(n)] for n in ("others_cores", "stolen_cores"))
    contention = Contention(fmean(others), fmean(stolen)) if others and stolen else None
    return replace(result, conditions=seen, contention=contention, energy=energy)
