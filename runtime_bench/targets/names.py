"""Several targets by one name: all devices that adb has, and those that a file lists."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from cfsp.errors import InputError
from cfsp.reading import read_text

ALL_DEVICES, LISTED = "adb:*", "@"
_WAIT_S = 60.0


def every_target(names: Sequence[str]) -> tuple[str, ...]:
    """The names of single targets that names stand for, each once, in order; nothing is opened.

    `adb:*` is every device that `adb devices` lists, whatever its state: one that cannot be used is to be told of.
    `@FILE` are the lines of a file, without empty ones and what follows a #.

    Raises:
        InputError: No adb, no device, or a file that cannot be read or lists nothing.
    """
    found: list[str] = []
    for name in names:
        if name == ALL_DEVICES:
            found += _attached()
        elif name.startswith(LISTED):
            found += every_target(_listed(Path(name.removeprefix(LISTED))))
        else:
            found.append(name)
    return tuple(dict.fromkeys(found))


def _attached() -> list[str]:
    try:
        done = subprocess.run(
            ["adb", "devices"], capture_output=True, text=True, check=False, timeout=_WAIT_S
        )
    except FileNotFoundError:
        raise InputError("adb is not installed", field="--on", value=ALL_DEVICES) from None
    except subprocess.TimeoutExpired:
        raise InputError("adb does not answer", field="--on", value=ALL_DEVICES) from None
    serials = [line.partition("\t")[0] for line in done.stdout.splitlines() if "\t" in line]
    if not serials:
        allowed = "a device that adb devices lists"
        raise InputError("no device is attached", field="--on", value=ALL_DEVICES, allowed=allowed)
    return [f"adb:{serial}" for serial in serials]


def _listed(file: Path) -> list[str]:
    lines = [line.partition("#")[0].strip() for line in read_text(file).splitlines()]
    names = [line for line in lines if line]
    if not names or any(name.startswith(LISTED) for name in names):
        raise InputError("lists no targets", field="--on", value=f"@{file}", allowed="a target a line")
    return names
