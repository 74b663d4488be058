"""What `bench --on` can name: a row for each kind of target. Whatever follows a colon is the target's address."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    """What limits a constrained run, as it was given.

    Attributes:
        memory: A size.
        cores: Lists of core numbers.
        device: A device whose memory is the limit.
    """

    memory: str | None = None
    cores: tuple[str, ...] = ()
    device: str | None = None

    @property
    def given(self) -> list[str]:
        """The options that were used."""
        values = {"--memory": self.memory, "--cores": self.cores, "--device": self.device}
        return [name for name, value in values.items() if value]


@dataclass(frozen=True)
class TargetRow:
    """One kind of target.

    Attributes:
        form: How it is written.
        open: Makes it from its address and the limits.
        limited: Whether limits are for it.
    """

    form: str
    open: Callable[[str, Limits], Target]
    limited: bool = False


def open_target(on: str, limits: Limits) -> Target:
    """Where to measure.

    Raises:
        InputError: Unknown, limits without a constrained target, or a target that cannot be used.
    """
    row, address = find_row(on)
    if limits.given and not row.limited:
        raise InputError(
            "a limit is for a constrained run", field=limits.given[0], allowed="--on constrained"
        )
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
    from runtime_bench.targets.browser import Browser

    return Browser()


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
        "constrained": TargetRow("constrained", _constrained, limited=True),
        "browser": TargetRow("browser", _browser),
        "qemu-aarch64": TargetRow("qemu-aarch64", _qemu),
    }
)
