"""Android devices through adb, of which Android 7 and newer tell how a command ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cfsp.errors import InputError
from runtime_bench.targets.transport import meaning_of

_FAILURES = (
    ("unauthorized", "the device has not authorized this computer; accept its key on the screen"),
    ("device still", "the device is not ready yet; try again, and look at its screen"),
    ("no permissions", "this user may not use the device; see Android's udev rules"),
    ("offline", "the device is offline; unplug it and plug it in again, or adb reconnect"),
    ("not found", "no such device; adb devices lists those that are there"),
    ("no devices", "no such device; adb devices lists those that are there"),
    ("cannot connect to daemon", "adb's server does not start"),
    ("closed", "the device went away: the connection was closed"),
)


@dataclass(frozen=True)
class Adb:
    """A device; see `runtime_bench.targets.transport.Transport`.

    Raises:
        InputError: No serial number.
    """

    serial: str  # As `adb devices` has it

    client = "adb"
    folder = "/data/local/tmp/phoneready"
    """The one place that the shell user may write to and run programs from."""

    def __post_init__(self) -> None:
        if not self.serial.strip() or self.serial.startswith("-") or not self.serial.isprintable():
            raise InputError(
                "no serial number",
                field="--on",
                value=f"adb:{self.serial}",
                allowed="adb:SERIAL, as adb devices has it",
            )

    @property
    def name(self) -> str:
        """As records have it."""
        return f"adb:{self.serial}"

    def command(self, line: str) -> list[str]:
        """See `Transport`. `-T`: no terminal, so that bytes pass as they are."""
        return [self.client, "-s", self.serial, "shell", "-T", line]

    def failure(self, lines: Sequence[str], status: int) -> str:
        """See `Transport`."""
        said = f": {lines[-1]}" if lines else ""
        ended = f"the device went away, or is older than Android 7: adb ended with status {status}{said}"
        return meaning_of(lines, _FAILURES) or ended
