"""Sizes, numbers and times as people write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from cfsp.errors import InputError

_BYTES: Mapping[str, int] = MappingProxyType(
    {"": 1, "b": 1}
    | {letter + more: 2 ** (10 * i) for i, letter in enumerate("kmg", 1) for more in ("", "ib")}
    | {letter + "b": 10 ** (3 * i) for i, letter in enumerate("kmg", 1)}
)
_FEWEST_BYTES = 10**6
"""Below this a size without a unit is taken for a mistake."""
_MS: Mapping[str, float] = MappingProxyType({"ms": 1.0, "s": 1e3, "us": 1e-3})
_SECONDS: Mapping[str, float] = MappingProxyType({"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0})


def format_bytes(count: float | None) -> str:
    """A size in binary units, as `97.2 MiB`; a dash for what is unknown."""
    if count is None:
        return "-"
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def megabytes(count: int) -> str:
    """A size as limits are given: in powers of 1000."""
    return f"{count / 1e6:.{1 if count >= 1e7 else 3}f} MB"


def format_seconds(seconds: float) -> str:
    """A time as people say it: `40 s`, `4 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def parse_bytes(text: str, field: str) -> int:
    """A size: `400M` and `400 MiB` in powers of 1024, `80 MB` in powers of 1000, or at least a million bytes.

    Raises:
        InputError: No size, or a small number without a unit.
    """
    count = round(_parse(text, _BYTES, field, "such as 400M, 400 MiB or 420 MB"))
    if count < _FEWEST_BYTES and not text.strip()[-1].isalpha():
        allowed = f"{text.strip()}MB, or {text.strip()}B if bytes are meant"
        raise InputError("a size without a unit", field=field, value=text, allowed=allowed)
    return count


def parse_ms(text: str, field: str) -> float:
    """A time with its unit, such as `120 ms` or `1.5 s`, in milliseconds; raises InputError."""
    return _parse(text, _MS, field, "such as 120 ms or 1.5 s")


def parse_seconds(text: str, field: str) -> float:
    """A time such as `10m`, `90 s`, `1.5 h` or `90`, in seconds; raises InputError."""
    return _parse(text, _SECONDS, field, "such as 10m, 90s or 1.5h")


def _parse(text: str, units: Mapping[str, float], field: str, allowed: str) -> float:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)", text.strip())
    unit = match[2].lower() if match else ""
    if match is None or unit not in units:
        raise InputError("not understood", field=field, value=text, allowed=allowed)
    return float(match[1]) * units[unit]
