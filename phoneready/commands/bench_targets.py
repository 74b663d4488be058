"""What `bench --on` can name: a row for each kind of target. Whatever follows a colon is the target's address."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING

from cfsp.errors import InputError
from phoneready.commands.options import split_numbers
from phoneready.console import show_progress
from phoneready.units import parse_bytes

if TYPE_CHECKING:
    from runtime_bench.targets import Target

__all__ = ["TARGETS", "Limits", "TargetRow", "find_row", "open_target"]


@dataclass(frozen=True)
class Limits:
    """What limits a run, as it was given; each is for some targets.

    Attributes:
        memory: A size.
        cores: Lists of core numbers.
        device: A device whose memory, or whose browser's score, is the limit.
        score: Score that a browser's page is slowed down to.
    """

    memory: str | None = None
    cores: tuple[str, ...] = ()
    device: str | None = None
    score: float | None = None

    @property
    def given(self) -> list[str]:
        """The options that were used."""
        return [f"--{field.name}" for field in fields(self) if getattr(self, field.name)]


@dataclass(frozen=True)
class TargetRow:
    """One kind of target.

    Attributes:
        form: How it is written.
        open: Makes it from its address and the limits.
        takes: Limits that are for it.
    """

    form: str
    open: Callable[[str, Limits], Target]
    takes: frozenset[str] = frozenset()


def open_target(on: str, limits: Limits) -> Target:
    """Where to measure.

    Raises:
        InputError: Unknown, a limit of another target, or a target that cannot be used.
    """
    row, address = find_row(on)
    wrong = next((name for name in limits.given if name not in row.takes), None)
    if wrong:
        takers = " or ".join(row.form for row in TARGETS.values() if wrong in row.takes)
        raise InputError("a limit of another target", field=wrong, allowed=f"--on {takers}")
    return row.open(address, limits)


def find_row(on: str) -> tuple[TargetRow, str]:
    """The row of a target and its address; nothing is opened.

    Raises:
        InputError: There is none, or the address is missing or too much.
    """
    name, colon, address = on.partition(":")
    row = TARGETS.get(name)
    if row is None or bool(colon) != (":" in row.form) or (colon and not address):
        forms = ", ".join(row.form for row in TARGETS.values())
        raise InputError("unknown target", field="--on", value=on, allowed=forms)
    return row, address


def _local(_: str, limits: Limits) -> Target:
    from runtime_bench.targets import LOCAL

    return LOCAL


def _constrained(_: str, limits: Limits) -> Target:
    from runtime_bench.targets.constrained import Constrained

    if limits.memory and limits.device:
        raise InputError("one of --memory and --device says the limit, not both", field="--memory")
    memory = parse_bytes(limits.memory, "--memory") if limits.memory else None
    memory = _memory_of(limits.device) if limits.device else memory
    return Constrained(memory, split_numbers(limits.cores, "--cores"))


def _browser(_: str, limits: Limits) -> Target:
    from runtime_bench.device_profile import find_profile, load_profiles
    from runtime_bench.targets.browser import Browser, browser_of

    if limits.device is None:
        return Browser(target_score=limits.score)
    return browser_of(find_profile(limits.device, load_profiles()).profile, limits.score)


def _native(_: str, limits: Limits) -> Target:
    from runtime_bench.targets.native import native

    with show_progress() as progress:
        return native(progress)


def _qemu(_: str, limits: Limits) -> Target:
    from runtime_bench.targets.qemu import qemu_aarch64

    with show_progress() as progress:
        return qemu_aarch64(progress)


def _memory_of(device: str) -> int:
    from runtime_bench.device_profile import find_profile, load_profiles
    from runtime_bench.projection import memory_limit

    limit, why = memory_limit(find_profile(device, load_profiles()).profile)
    if limit is None:
        raise InputError(why, field="--device", value=device, allowed="--memory SIZE")
    return limit


TARGETS: MappingProxyType[str, TargetRow] = MappingProxyType(
    {
        "local": TargetRow("local", _local),
        "native": TargetRow("native", _native),
        "constrained": TargetRow("constrained", _constrained, frozenset({"--memory", "--cores", "--device"})),
        "browser": TargetRow("browser", _browser, frozenset({"--device", "--score"})),
        "qemu-aarch64": TargetRow("qemu-aarch64", _qemu),
    }
)
