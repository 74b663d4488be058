"""What `bench --on` can name: a row for each kind of target. Whatever follows a colon is the target's address. Other
distributions add rows by entry point (cfsp.plugins). Every command imports this: what takes long to import waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from cfsp import plugins
from cfsp.errors import InputError
from cfsp.progress import Progress, no_progress
from cfsp.settings import Reads, Settings, setting
from cfsp.units import parse_bytes
from runtime_bench.devices.profile import find_profile, load_profiles
from runtime_bench.devices.projection import memory_limit
from runtime_bench.targets import LOCAL, Target
from runtime_bench.targets.adb import Adb
from runtime_bench.targets.constrained import Constrained
from runtime_bench.targets.ssh import Ssh
from runtime_bench.targets.transport import Transport

if TYPE_CHECKING:
    from runtime_bench.targets.remote import Remote


@dataclass(frozen=True)
class TargetOptions(Settings):
    """Options of targets, as they were given; each is for some of them. Their names are the options' names."""

    memory: str | None = setting(
        None, "Memory that a constrained run may use, as 400M or 2G.", metavar="SIZE"
    )
    cores: tuple[int, ...] = setting(
        (), "Cores that a constrained run may use, as 0,1.", ge=0, le=4095, metavar="N,..."
    )
    device: str | None = setting(
        None, "Take limits from this device's profile: memory, or the score of its browser.", metavar="NAME"
    )
    score: float | None = setting(None, "Slow the browser's page down to this score.", gt=0, metavar="NUMBER")
    runner: Path | None = setting(
        None, "Native program to measure GGUF files with, here or on other machines.", shown="built here once"
    )
    ndk: Path | None = setting(
        None, "Folder of the Android NDK, to build the runner for Android with.", metavar="DIR"
    )
    remote_folder: str | None = setting(
        None,
        "Where to put files on other machines: an absolute path.",
        metavar="DIR",
        shown="a cache folder there",
    )
    ssh_config: Path | None = setting(None, "Configuration of the ssh client, instead of your own.")
    retries: int = setting(
        2,
        "How often a connection to another machine that broke, or could not be made, is tried again in all.",
        ge=0,
        le=1000,
        metavar="N",
    )


@dataclass(frozen=True)
class TargetRow:
    """One kind of target."""

    form: str  # How it is written
    # Makes it from its address, the options and what shows the progress of building it
    open: Callable[[str, TargetOptions, Progress], Target]
    takes: frozenset[str] = frozenset()  # Options that are for it
    gguf_only: bool = False  # Whether it runs GGUF files alone
    answers: bool = False  # Whether it is `runtime_bench.targets.Answering`
    has_runner: bool = False  # Whether GGUF files run in the native runner there
    tells_cache: bool = True  # Whether its engines can be told the type of their cache


def open_targets(
    names: Sequence[str], options: TargetOptions, progress: Progress = no_progress
) -> list[Target]:
    """Where to measure: each target once. Nothing is connected to yet.

    Raises:
        InputError: Unknown, an option that none of the targets can do, or a target that cannot be used.
    """
    rows = [find_row(name) for name in dict.fromkeys(names)]
    taken = frozenset[str]().union(*(row.takes for row, _ in rows))
    given = [option.name for option in fields(options) if getattr(options, option.name) != option.default]
    strange = [name for name in given if name not in taken]
    if strange:
        option = f"--{strange[0].replace('_', '-')}"
        raise InputError("not for this target", field=option, allowed=_takers(strange[0]))
    if options.runner is not None and len(rows) > 1 and TARGETS["native"] in (row for row, _ in rows):
        raise InputError(
            "one program, for this machine or for others", field="--runner", allowed="one target"
        )
    return [row.open(address, options, progress) for row, address in rows]


def open_remote(name: str, options: TargetOptions) -> Remote:
    """Another machine.

    Raises:
        InputError: The name is not one of such a target.
    """
    from runtime_bench.targets.remote import Remote

    (target,) = open_targets([name], options)
    if not isinstance(target, Remote):
        raise InputError("not another machine", field="target", value=name, allowed="ssh:HOST, adb:SERIAL")
    return target


def find_row(name: str) -> tuple[TargetRow, str]:
    """The row of a target and its address; nothing is opened.

    Raises:
        InputError: There is none, or the address is missing or too much.
    """
    kind, colon, address = name.partition(":")
    others = plugins.load_plugins(plugins.TARGETS, TARGETS)
    row = others[kind].load(TargetRow) if kind in others else TARGETS.get(kind)
    if row is None or bool(colon) != (":" in row.form) or (colon and not address):
        forms = ", ".join([*(known.form for known in TARGETS.values()), *others])
        raise InputError("unknown target", field="--on", value=name, allowed=forms)
    return row, address


def _constrained(_: str, options: TargetOptions, progress: Progress) -> Target:
    if options.memory and options.device:
        raise InputError("one of --memory and --device says the limit, not both", field="--memory")
    memory = parse_bytes(options.memory, "--memory") if options.memory else None
    if options.device:
        memory, why = memory_limit(find_profile(options.device, load_profiles()).profile)
        if memory is None:
            raise InputError(why, field="--device", value=options.device, allowed="--memory SIZE")
    return Constrained(memory, options.cores)


def _browser(_: str, options: TargetOptions, progress: Progress) -> Target:
    from runtime_bench.targets.browser import Browser, browser_of

    if options.device is None:
        return Browser(target_score=options.score)
    return browser_of(find_profile(options.device, load_profiles()).profile, options.score)


def _native(_: str, options: TargetOptions, progress: Progress) -> Target:
    from runtime_bench.native.build import build_runner
    from runtime_bench.targets.native import Native

    if options.runner is None:
        return Native(build_runner("native", progress=progress))
    program = options.runner.resolve()
    if not program.is_file():
        raise InputError("no such program", field="--runner", value=str(options.runner))
    return Native(program)


def _qemu(_: str, options: TargetOptions, progress: Progress) -> Target:
    from runtime_bench.targets.native import qemu_aarch64

    return qemu_aarch64(progress)


def _remote(transport: Transport, options: TargetOptions) -> Target:
    from runtime_bench.targets.remote import Remote

    return Remote(
        transport,
        runner=options.runner,
        ndk=options.ndk,
        folder=options.remote_folder,
        retries=options.retries,
    )


_LIMITS = frozenset({"memory", "cores", "device"})
_PLACES = frozenset({"runner", "ndk", "remote_folder", "retries"})
TARGETS: MappingProxyType[str, TargetRow] = MappingProxyType(
    {
        "local": TargetRow("local", lambda address, options, progress: LOCAL),
        "native": TargetRow(
            "native", _native, frozenset({"runner"}), gguf_only=True, answers=True, has_runner=True
        ),
        "constrained": TargetRow("constrained", _constrained, _LIMITS),
        "browser": TargetRow("browser", _browser, frozenset({"device", "score"}), tells_cache=False),
        "ssh": TargetRow(
            "ssh:HOST",
            lambda host, options, _: _remote(Ssh(host, options.ssh_config), options),
            _PLACES | {"ssh_config"},
            answers=True,
            has_runner=True,
        ),
        "adb": TargetRow(
            "adb:SERIAL",
            lambda serial, options, _: _remote(Adb(serial), options),
            _PLACES,
            answers=True,
            has_runner=True,
        ),
        "qemu-aarch64": TargetRow("qemu-aarch64", _qemu, gguf_only=True, answers=True, has_runner=True),
    }
)


def _is_taken(option: str, _: object, names: Sequence[str]) -> bool:
    return any(option in find_row(name)[0].takes for name in names)


def _takers(option: str) -> str:
    return ", ".join(f"--on {row.form}" for row in TARGETS.values() if option in row.takes)


READS: Reads = MappingProxyType(
    {
        option: (partial(_is_taken, option), f"without {_takers(option)}")
        for option in ("ndk", "remote_folder", "ssh_config", "retries")
    }
)
"""Of options that say how another machine is reached, used with the names of the targets."""
