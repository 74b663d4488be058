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
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from cfsp.errors import InputError, PhonereadyError
from cfsp.files import atomic_file, sha256_file
from cfsp.models.builtin import cache_directory
from cfsp.progress import Progress, no_progress
from cfsp.records import tool_version
from exporters.onnx.folder import folder_of
from runtime_bench.conditions.looks import conditions_of
from runtime_bench.conditions.script import WATCH
from runtime_bench.engines import engine_for, engine_spec, files_of
from runtime_bench.environment import environment_of
from runtime_bench.native.build import build_runner, cpu_features, runner_target_for
from runtime_bench.process import ProcessFailed, exit_reason, read_answer, result_of
from runtime_bench.records.bench_record import EMULATED, Environment
from runtime_bench.records.reported import Conditions, Contention, unknown_conditions
from runtime_bench.targets import remote_scripts
from runtime_bench.targets.local import RUNNER_ENGINE
from runtime_bench.targets.remote_shell import (
    RemoteError,
    RemoteShell,
    StoppedError,
    Transport,
    UnreachableError,
)
from runtime_bench.worker import AnswerRequest, AnswerResult, WorkerRequest, WorkerResult

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
Files = Sequence[tuple[Path, str]]
"""Files that lie together in one folder there, and their names in it; the first is the one that an engine opens."""


class PushedFile(NamedTuple):
    """A file here, and its place there, below the folder for all that is pushed."""

    path: Path
    place: str
    sha256: str
    size_bytes: int


class Machine(NamedTuple):
    """A machine that answered."""

    folder: str  # For pushed files, absolute
    system: str  # The kernel's name
    machine: str  # Instruction set, as the kernel calls it
    abi: str  # Android's name of that; empty elsewhere
    features: frozenset[str]  # That its processor names
    environment: Environment  # For records
    is_emulator: bool  # Android's, which takes the time of whatever machine it runs on


def model_files(path: Path) -> Files:
    """A model file; for ONNX with its weights and its variant's tokenizer and configurations."""
    if path.suffix.lower() != ".onnx":
        return [(path, f"model{path.suffix.lower()}")]
    folder = folder_of(path)
    companions = sorted(file for file in folder.iterdir() if file.suffix in _COMPANIONS and file.is_file())
    place = "" if folder == path.resolve().parent else f"{path.resolve().parent.name}/"
    return [(file, place + file.name) for file in files_of(path)] + [(file, file.name) for file in companions]


def pushed_files(files: Files) -> list[PushedFile]:
    """Their folder is named by the file's SHA-256, or of several files by the SHA-256 of names and sums.
    Raises InputError: a file cannot be read."""
    try:
        sums = [sha256_file(path) for path, _ in files]
        sizes = [path.stat().st_size for path, _ in files]
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from error
    listing = "".join(f"{digest}  {name}\n" for digest, (_, name) in zip(sums, files, strict=True))
    folder = sums[0] if len(sums) == 1 else hashlib.sha256(listing.encode()).hexdigest()
    return [
        PushedFile(path, f"{folder}/{name}", digest, size)
        for (path, name), digest, size in zip(files, sums, sizes, strict=True)
    ]


def describe(shell: RemoteShell, folder: str) -> Machine:
    """Connect and ask; files shall go to `folder`, if that is empty to one under the home there. Raises
    RemoteError: no connection, or no sensible answer."""
    reply = shell.run(remote_scripts.DESCRIBE, folder, timeout_s=ANSWER_S)
    facts: dict[str, str] = {}
    texts: dict[str, list[str]] = {}
    for line in reply.text.partition(f"{remote_scripts.FACTS_FOLLOW}\n")[2].splitlines():
        path, colon, content = line.partition(":")
        if line.startswith("/") and colon:
            texts.setdefault(path, []).append(content)
        else:
            name, _, value = line.partition("=")
            facts[name] = value.strip()
    if not facts.get("folder", "").startswith("/") or not facts.get("machine"):
        raise RemoteError("its shell does not say what machine it is")
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
class Remote:
    """A machine behind a transport; see `runtime_bench.targets.Target`. Raises InputError: a folder that is
    not absolute, or has control characters in its name."""

    transport: Transport
    _: KW_ONLY
    runner: Path | None = None  # Native program to measure with, instead of the one that is built here
    ndk: Path | None = None  # Folder of the Android NDK, to build one for Android with
    folder: str | None = None  # Where to put files there, absolute; None for the transport's
    retries: int = 0  # How often, in all, a connection that broke or could not be made is tried again
    progress: Progress = no_progress  # Told what is built and pushed
    _shell: RemoteShell = field(init=False, repr=False)
    _left: int = field(init=False, repr=False)
    _machine: Machine | None = field(default=None, init=False, repr=False)
    # What is there since it answered: files, and programs by engine, or why there is none
    _there: dict[Path, str] = field(default_factory=dict, init=False, repr=False)
    _programs: dict[str, list[str] | PhonereadyError] = field(default_factory=dict, init=False, repr=False)
    _problem: RemoteError | None = field(default=None, init=False, repr=False)
    _waited_s: float = field(default=0.0, init=False, repr=False)

    memory_limit_bytes = None
    lasts = True

    def __post_init__(self) -> None:
        if self.folder is not None and not (self.folder.startswith("/") and self.folder.isprintable()):
            raise InputError("not an absolute path in one line", field="folder", value=self.folder)
        self._shell, self._left = RemoteShell(self.transport), self.retries

    @property
    def name(self) -> str:
        return self.transport.name

    @property
    def kind(self) -> str:
        """Known once it has answered."""
        return EMULATED if self._machine is not None and self._machine.is_emulator else "measured"

    def default_engine(self, path: Path) -> str:
        return engine_for(path)

    def require(self, engine: str) -> None:
        """See `Target`. Whether the machine has the engine, a run finds out, so that other rows go on."""
        if not engine_spec(engine).remote_packages and engine != RUNNER_ENGINE:
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
        except RemoteError as error:
            self._waited_s += time.monotonic() - began
            self._lose(error)
            return nothing
        self._machine = self._machine or machine
        return machine.environment

    def conditions(self) -> Conditions:
        """See `Target`. A machine that does not answer is told of by the run that follows."""
        try:
            reply = self._shell.run(WATCH, "", timeout_s=ANSWER_S)
        except RemoteError as error:
            return unknown_conditions(f"{self.name}: {error}")
        return conditions_of(reply.text, why=_NO_PROC)

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        """See `Target`; what is missing there is pushed first. Raises StoppedError: after `stop`."""
        try:
            answer, looks = self._ask(request, timeout_s, metered=request.energy)
        except StoppedError:
            raise
        except PhonereadyError as error:
            return WorkerResult(error=str(error))
        result = result_of(answer, looks.decode("utf-8", "replace"), _NO_PROC, metered=request.energy)
        seen = result.conditions or Conditions()
        others, stolen = ([v for _, v in seen.during_samples(n)] for n in ("others_cores", "stolen_cores"))
        contention = Contention(fmean(others), fmean(stolen)) if others and stolen else None
        return replace(result, contention=contention)

    def answer(self, request: AnswerRequest, timeout_s: float) -> AnswerResult:
        """See `runtime_bench.targets.Answering`; the questions are pushed for it, and removed after it.
        Raises StoppedError: after `stop`."""
        try:
            return read_answer(AnswerResult, self._ask(request, timeout_s)[0])
        except StoppedError:
            raise
        except (PhonereadyError, ProcessFailed) as error:
            return AnswerResult(error=str(error))
        finally:
            # What cannot be removed now, `devices clean` removes.
            with contextlib.suppress(RemoteError, StoppedError):
                if self._machine is not None:
                    questions = Path(request.questions)
                    name = pushed_files([(questions, questions.name)])[0].place.partition("/")[0]
                    place = f"{self._machine.folder}/{name}"
                    self._shell.run(remote_scripts.FORGET, place, timeout_s=ANSWER_S)
                    self._there.pop(questions, None)

    def clean(self) -> tuple[int, tuple[str, ...]]:
        """Remove all that was ever pushed there; returns how many files and programs that was, and what is left
        in the folder. Raises RemoteError: it cannot be reached."""
        shell = RemoteShell(self.transport)  # one that `stop` did not stop
        try:
            folder = describe(shell, self.folder or self.transport.folder).folder
            reply = shell.run(remote_scripts.CLEAN, folder, timeout_s=ANSWER_S)
            reply.check("removing files")
        except RemoteError as error:
            raise RemoteError(f"{self.name}: {error}") from error
        self._machine, self._there, self._programs = None, {}, {}
        said = [line.partition(" ")[::2] for line in reply.text.splitlines()]
        return sum(word == "removed" for word, _ in said), tuple(
            name for word, name in said if word == "left"
        )

    def stop(self) -> None:
        """End what runs there; `run`, in whatever thread, raises StoppedError."""
        self._shell.stop()

    def _connected(self) -> Machine:
        if self._machine is None and self._problem is None:
            self.environment()
        if self._machine is None:
            raise self._problem or RemoteError(f"{self.name} does not answer")
        return self._machine

    def _lose(self, error: RemoteError) -> None:
        """What is there has to be looked for again, should it come back."""
        prefix = f"{self.name}: "
        named = error if str(error).startswith(prefix) else type(error)(f"{prefix}{error}")
        self._machine, self._there, self._programs, self._problem = None, {}, {}, named

    def _ask(
        self, request: WorkerRequest | AnswerRequest, timeout_s: float, *, metered: bool = False
    ) -> tuple[bytes, bytes]:
        """Have a program there answer a request, once more if the connection breaks and may be tried again.

        Returns:
            The last line that the program wrote, and the looks at the machine.

        Raises:
            PhonereadyError: It does not; the text names the target if that is what fails.
        """
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                folder = self._connected().folder
                command = self._program(request.engine)
                asked = replace(request, path=self._have(model_files(Path(request.path))))
                if isinstance(asked, AnswerRequest):
                    questions = Path(asked.questions)
                    asked = replace(asked, questions=self._have([(questions, questions.name)]))
                reply = self._shell.run(
                    remote_scripts.RUN,
                    folder,
                    "metered" if metered else "",
                    *command,
                    line=json.dumps(asdict(asked)),
                    timeout_s=timeout_s + _GRACE_S,
                )
                break
            except UnreachableError as error:
                self._lose(error)
                if self._left <= 0:
                    assert self._problem is not None
                    raise self._problem from None
            self._left -= 1
            logger.warning("%s; tried again in %g s", self._problem, pause_s)
            self._shell.check_stopped(pause_s)
            self._problem, self._waited_s, pause_s = None, 0.0, min(2 * pause_s, _LONGEST_PAUSE_S)
        if reply.status == _CANNOT_EXECUTE:
            raise RemoteError(
                f"the runner cannot be executed in {folder}; name a folder that allows it: {self.name},folder=DIR"
            )
        if reply.status:
            raise RemoteError(exit_reason(reply.status, reply.errors))
        output, _, looks = reply.output.partition(f"\n{remote_scripts.LOOKS_FOLLOW}\n".encode())
        return output.strip().rpartition(b"\n")[2], looks

    def _have(self, files: Files) -> str:
        """Have files there, each whole or not at all and checked by its sum; returns the path of the first
        there. Raises RemoteError: no space, no such folder, no connection, or a file that does not arrive as it
        was sent; InputError: a file here cannot be read."""
        path, folder = files[0][0], self._connected().folder
        if path not in self._there:
            pushed = pushed_files(files)
            words = [word for file in pushed for word in (f"{folder}/{file.place}", file.sha256)]
            hashing_s = sum(file.size_bytes for file in pushed) / _HASHED_PER_S
            reply = self._shell.run(remote_scripts.CHECK, *words, timeout_s=ANSWER_S + hashing_s)
            if reply.status:
                raise RemoteError("there is no sha256sum, without which nothing can be verified")
            answers = [word for word in reply.text.split() if word in ("same", "other")][-len(pushed) :]
            if len(answers) != len(pushed):
                raise RemoteError("it does not say which files it has")
            for file, answer in zip(pushed, answers, strict=True):
                if answer == "other":
                    self._push(file, folder)
            self._there[path] = f"{folder}/{pushed[0].place}"
        return self._there[path]

    def _push(self, file: PushedFile, folder: str) -> None:
        size, name = file.size_bytes, file.path.name

        def report(done: int) -> None:
            # The step ends when all is over: what was taken last is still being checked there.
            self.progress("pushing", min(done, size - 1), size)

        report(0)
        try:
            reply = self._shell.run(
                remote_scripts.PUSH,
                f"{folder}/{file.place}",
                file.sha256,
                timeout_s=_STALL_S,
                file=file.path,
                after_s=size / _HASHED_PER_S,
                on_bytes=report,
            )
        except OSError as error:
            raise RemoteError(f"cannot read {file.path}: {error.strerror}") from error
        finally:
            self.progress("pushing", size, size)
        if reply.status == remote_scripts.MISMATCH:
            raise RemoteError(f"{name} did not arrive as it was sent, or was changed meanwhile")
        if any(mark in line for mark in _NO_SPACE for line in reply.errors):
            raise RemoteError(f"no space left there for {name} ({size / 2**20:.1f} MiB) in {folder}")
        reply.check(f"pushing {name}")

    def _program(self, engine: str) -> list[str]:
        """The program that measures, with its arguments. A failure is remembered: finding out takes minutes."""
        if engine not in self._programs:
            try:
                self._programs[engine] = self._found(engine, self._connected())
            except (StoppedError, UnreachableError):
                raise
            except PhonereadyError as error:
                self._programs[engine] = error
        program = self._programs[engine]
        if isinstance(program, PhonereadyError):
            raise program
        return program

    def _found(self, engine: str, machine: Machine) -> list[str]:
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
            try:
                with runner.open("rb") as stream:
                    head = stream.read(20)
            except OSError as error:
                raise InputError(f"cannot read {runner}: {error.strerror}") from error
            made_for = (
                _MACHINES.get(int.from_bytes(head[18:20], "little")) if head[:4] == b"\x7fELF" else None
            )
            if made_for and made_for != machine.machine:
                raise RemoteError(
                    f"wrong ABI: {runner.name} is for {made_for}, the device is {machine.machine}"
                )
            return [self._have([(runner, "runner")])]
        if machine.abi:
            raise RemoteError(
                f"{engine} needs Python there, which Android does not have; measure a GGUF file"
            )
        packages = engine_spec(engine).remote_packages
        reply = self._shell.run(remote_scripts.HAVE_PACKAGES, _PYTHON, *packages, timeout_s=ANSWER_S)
        if reply.status:
            raise RemoteError(f"{engine} needs Python there, and there is no {_PYTHON}")
        if lacking := reply.text.strip().rpartition("\n")[2].split():
            what = "3.11 or newer" if "python" in lacking else f"with {', '.join(lacking)}"
            raise RemoteError(f"{engine} needs a {_PYTHON} {what} there")
        packed, root = cache_directory() / "worker.zip", Path(__file__).resolve().parents[2]
        # The packages that the worker needs, imported from a zip file. The same sources give the same bytes, so that
        # they are pushed once.
        entries = [
            (file, zipfile.ZipInfo(file.relative_to(root).as_posix(), (1980, 1, 1, 0, 0, 0)))
            for package in _PACKAGES
            for file in sorted((root / package).rglob("*.py"))
        ]
        deflated = zipfile.ZIP_DEFLATED
        with (
            _BUILDING,
            atomic_file(packed) as temporary,
            zipfile.ZipFile(temporary, "w", deflated) as archive,
        ):
            for file, entry in entries:
                archive.writestr(entry, file.read_bytes(), deflated)
        path = self._have([(packed, "worker.zip")])
        return ["env", f"PYTHONPATH={path}", _PYTHON, "-P", "-m", "runtime_bench.worker"]
