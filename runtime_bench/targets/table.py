"""Targets by name: KIND, or KIND:ADDRESS, with options behind commas. `bench --on`, `eval --on` and releases take them.

local                            this machine as it is
constrained:400M                 with that much memory
constrained:pixel-8a,cores=0+1   with what one application may use on that device, on those cores
browser:pixel-8a                 a browser that stands for that device's
ssh:HOST,folder=/data/bench      another machine

Other distributions add rows by entry point (cfsp.plugins). Every command imports this: what takes long to import waits.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cfsp import plugins
from cfsp.errors import InputError
from cfsp.files import sha256_file
from cfsp.progress import Progress, no_progress
from cfsp.reading import read_text
from cfsp.units import parse_bytes
from runtime_bench.devices import DeviceProfile, find_profile, load_profiles, memory_limit
from runtime_bench.environment import environment_of
from runtime_bench.native.build import build_runner
from runtime_bench.records.bench_record import Environment
from runtime_bench.records.reported import Conditions, unknown_conditions
from runtime_bench.targets import LOCAL, Target, ThisMachine
from runtime_bench.targets.local import Browser, Constrained, Native, check_memory, qemu_aarch64
from runtime_bench.targets.remote_shell import Adb, Ssh, Transport
from runtime_bench.worker import WorkerRequest, WorkerResult

if TYPE_CHECKING:
    from runtime_bench.targets.remote import Remote

CONSTRAINED = "constrained"
ALL_DEVICES, LISTED = "adb:*", "@"
_ADB_S = 60.0
_SLUG = 80
"""Longest part of a file name."""


@dataclass(frozen=True)
class TargetOptions:
    """What may stand behind a target's address, as KEY=VALUE; memory and device stand there by themselves."""

    memory: int | None = None  # bytes that a run may use
    device: str | None = None  # whose limit of memory, or browser's score, is taken
    cores: tuple[int, ...] = ()  # that a run may use, as 0+1
    score: float | None = None  # to which the browser's page is slowed down
    runner: Path | None = None  # native program to measure GGUF files with; else one is built once
    ndk: Path | None = None  # folder of the Android NDK, to build it with
    folder: str | None = None  # there, absolute, for what is pushed
    config: Path | None = None  # of the ssh client
    retries: int = 2  # of a connection that broke or could not be made, in all


@dataclass(frozen=True)
class TargetRow:
    """One kind of target."""

    form: str  # How it is written
    open: Callable[
        [str, TargetOptions, Progress], Target
    ]  # Of its address, options, and who is told of building it
    takes: frozenset[str] = frozenset()  # Options that are for it
    gguf_only: bool = False
    answers: bool = False  # Whether it is `runtime_bench.targets.Answering`
    has_runner: bool = False  # Whether GGUF files run in the native runner there
    tells_cache: bool = True  # Whether its engines can be told the type of their cache


def open_target(name: str, progress: Progress = no_progress) -> Target:
    """The target of a name. Another machine is not connected to yet. Raises InputError: unknown, an option
    that it does not take, a target that cannot be used, or a plugin's that lacks members."""
    row, address, options = parse_target(name)
    target = row.open(address, options, progress)
    members = [member for member in vars(Target) if not member.startswith("_")]
    if lacking := {*members, *(["answer"] if row.answers else [])} - set(dir(target)):
        message = (
            f"{type(target).__name__} lacks {', '.join(sorted(lacking))} of runtime_bench.targets.Target"
        )
        raise InputError(message, field="--on", value=name)
    return target


def open_remote(name: str) -> Remote:
    """Another machine. Raises InputError: the name is not one of such a target."""
    from runtime_bench.targets.remote import Remote

    target = open_target(name)
    if not isinstance(target, Remote):
        raise InputError("not another machine", field="target", value=name, allowed="ssh:HOST, adb:SERIAL")
    return target


def check_target(name: str) -> str:
    """The name, if there can be such a target; nothing is opened. Raises InputError: there cannot."""
    row, address, options = parse_target(name)
    if address:
        row.open(address, options, no_progress)  # which checks the address, and connects to nothing
    return name


def target_beside(name: str, folder: Path) -> str:
    """The name with files that are in `folder` resolved from there."""
    address, *options = name.split(",")
    pairs = (option.partition("=") for option in options)
    found = [(key, folder / value) for key, _, value in pairs if key in _FILES and (folder / value).exists()]
    paths = {key: f"{key}={path}" for key, path in found}
    return ",".join((address, *(paths.get(option.partition("=")[0], option) for option in options)))


def target_details(name: str) -> dict[str, Any]:
    """What a target's name refers to and that may change while the name stays."""
    options = parse_target(name)[2]
    found: dict[str, Any] = _profile(options.device).model_dump(mode="json") if options.device else {}
    if options.runner and options.runner.is_file():
        found["runner_sha256"] = sha256_file(options.runner)
    return found


def target_slug(name: str) -> str:
    """The name as part of a file name; a long one ends in its hash."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")
    return slug if len(slug) <= _SLUG else f"{slug[:_SLUG]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def parse_target(name: str) -> tuple[TargetRow, str, TargetOptions]:
    """A name's row, address and options. Raises InputError: there is no such target, the address is missing
    or too much, or an option is not for it."""
    kind, colon, rest = name.partition(":")
    others = plugins.load_plugins(plugins.TARGETS, TARGETS)
    row = others[kind].load(TargetRow) if kind in others else TARGETS.get(kind)
    parts = rest.split(",") if colon else []
    address = parts.pop(0) if row and ":" in row.form and parts else ""
    if row is None or (":" in row.form) != bool(address) or "" in parts or (parts and not row.takes):
        forms = ", ".join([*(known.form for known in TARGETS.values()), *others])
        raise InputError("unknown target", field="--on", value=name, allowed=forms)
    given: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            key, value = ("memory" if part[0].isdecimal() else "device"), part
        if key not in row.takes or not value:
            known = ", ".join(f"{one}=" for one in sorted(row.takes))
            raise InputError(
                f"{part}: not for this target", field="--on", value=name, allowed=known or row.form
            )
        if key in given:
            raise InputError(f"{part}: {key} is given twice", field="--on", value=name)
        try:
            given[key] = _READ.get(key, str)(value)
        except ValueError as error:
            raise InputError(f"{part}: {error}", field="--on", value=name) from None
    options = TargetOptions(**given)
    if kind == CONSTRAINED and options == TargetOptions():
        forms = "constrained:SIZE, constrained:DEVICE, either or neither with cores=0+1 after a comma"
        raise InputError("no limit", field="--on", value=name, allowed=forms)
    return row, address, options


def every_target(names: Sequence[str]) -> tuple[str, ...]:
    """The names of single targets that names stand for, each once, in order; nothing is opened.

    `adb:*` is every device that `adb devices` lists, whatever its state: one that cannot be used is to be
    told of. `@FILE` are the lines of a file, without empty ones and what follows a #. Raises InputError: no
    adb, no device, or a file that cannot be read or lists nothing.
    """
    found: list[str] = []
    for name in names:
        if name.partition(",")[0] == ALL_DEVICES:
            options = name.removeprefix(ALL_DEVICES)
            try:
                command = ["adb", "devices"]
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ADB_S)
            except FileNotFoundError:
                raise InputError("adb is not installed", field="--on", value=name) from None
            except subprocess.TimeoutExpired:
                raise InputError("adb does not answer", field="--on", value=name) from None
            serials = [line.partition("\t")[0] for line in done.stdout.splitlines() if "\t" in line]
            if not serials:
                allowed = "a device that adb devices lists"
                raise InputError("no device is attached", field="--on", value=name, allowed=allowed)
            found += [f"adb:{serial}{options}" for serial in serials]
        elif name.startswith(LISTED):
            lines = read_text(Path(name.removeprefix(LISTED))).splitlines()
            listed = [text for line in lines if (text := line.partition("#")[0].strip())]
            if not listed or any(one.startswith(LISTED) for one in listed):
                raise InputError("lists no targets", field="--on", value=name, allowed="a target a line")
            found += every_target(listed)
        else:
            found.append(name)
    return tuple(dict.fromkeys(found))


class Unreachable(ThisMachine):
    """A target that could not be opened: every run there fails with the reason."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        self.kind = "constrained-host" if name.startswith(CONSTRAINED) else "measured"

    def require(self, engine: str) -> None:
        """Nothing is checked."""

    def environment(self) -> Environment:
        return environment_of({}, cpus_usable=None, platform="unknown", versions={})

    def conditions(self) -> Conditions:
        return unknown_conditions(self.reason)

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        return WorkerResult(error=self.reason)


def _profile(name: str) -> DeviceProfile:
    return find_profile(name, load_profiles()).profile


def _memory(text: str) -> int:
    memory = parse_bytes(text, "--on")
    check_memory(memory)
    return memory


def _cores(text: str) -> tuple[int, ...]:
    names = text.split("+")
    if not all(name.isdecimal() and int(name) < 4096 for name in names):
        raise ValueError("not core numbers; allowed: such as cores=0+1")
    return tuple(map(int, names))


def _retries(text: str) -> int:
    if not text.isdecimal() or int(text) > 1000:
        raise ValueError("not a number up to 1000")
    return int(text)


_FILES = ("runner", "ndk", "config")
"""Options that name files here."""
_READ: Mapping[str, Callable[[str], Any]] = MappingProxyType(
    {
        "memory": _memory,
        "device": lambda text: _profile(text).id,
        "cores": _cores,
        "score": float,
        "retries": _retries,
        **dict.fromkeys(_FILES, lambda text: Path(text).expanduser()),
    }
)
"""How the options are read that are no text."""


def _constrained(_: str, options: TargetOptions, progress: Progress) -> Target:
    memory = options.memory
    if memory and options.device:
        raise InputError("either a size or a device says the limit, not both", field="--on")
    if options.device:
        memory, why = memory_limit(_profile(options.device))
        if memory is None:
            raise InputError(why, field="--on", value=options.device, allowed="constrained:SIZE")
    return Constrained(memory, options.cores)


def _browser(_: str, options: TargetOptions, progress: Progress) -> Target:
    if options.device is None:
        return Browser(target_score=options.score)
    profile = _profile(options.device)
    if profile.os == "ios":
        raise InputError(
            "browsers on iOS are WebKit, which Chromium cannot stand for",
            field="device",
            value=profile.id,
            allowed="a device with android or linux",
        )
    return Browser(profile.id, options.score or profile.browser_score.value)


def _native(_: str, options: TargetOptions, progress: Progress) -> Target:
    if options.runner is None:
        return Native(build_runner("native", progress=progress))
    program = options.runner.resolve()
    if not program.is_file():
        raise InputError("no such program", field="runner", value=str(options.runner))
    return Native(program)


def _remote(transport: Transport, options: TargetOptions) -> Target:
    from runtime_bench.targets.remote import Remote

    named = {key: getattr(options, key) for key in _THERE}
    return Remote(transport, **named)


_THERE = frozenset({"runner", "ndk", "folder", "retries"})
TARGETS: Mapping[str, TargetRow] = MappingProxyType(
    {
        "local": TargetRow("local", lambda address, options, progress: LOCAL),
        "native": TargetRow(
            "native", _native, frozenset({"runner"}), gguf_only=True, answers=True, has_runner=True
        ),
        CONSTRAINED: TargetRow(CONSTRAINED, _constrained, frozenset({"memory", "cores", "device"})),
        "browser": TargetRow("browser", _browser, frozenset({"device", "score"}), tells_cache=False),
        "ssh": TargetRow(
            "ssh:HOST",
            lambda host, options, _: _remote(Ssh(host, options.config), options),
            _THERE | {"config"},
            answers=True,
            has_runner=True,
        ),
        "adb": TargetRow(
            "adb:SERIAL",
            lambda serial, options, _: _remote(Adb(serial), options),
            _THERE,
            answers=True,
            has_runner=True,
        ),
        "qemu-aarch64": TargetRow(
            "qemu-aarch64",
            lambda address, options, progress: qemu_aarch64(progress),
            gguf_only=True,
            answers=True,
            has_runner=True,
        ),
    }
)
