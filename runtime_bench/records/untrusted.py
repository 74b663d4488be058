"""JSON that somebody else wrote: read with limits, so that a broken or hostile file ends in an error and not in all
of the memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cfsp.errors import InputError

MAX_FILE_BYTES = 256 * 2**20
"""Of a record file: a record is some kilobytes."""
MAX_TEXT = 8192
"""Characters of a text."""
MAX_ITEMS = 10_000
"""Of a list or an object."""
_MAX_DEPTH = 6
_MAX_INT = 2**63 - 1


def read_limited(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        InputError: It cannot be read, or is longer than MAX_FILE_BYTES.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"{path} is too large for records", allowed=f"up to {MAX_FILE_BYTES // 2**20} MiB")
    return content


def parse_json(content: bytes, where: str) -> Any:
    """Parse one JSON document of finite numbers.

    Raises:
        json.JSONDecodeError, UnicodeDecodeError: It is no complete JSON.
        InputError: It is, but nested too deeply, or with NaN, infinity or a number of thousands of digits.
    """
    try:
        return json.loads(content, parse_constant=lambda name: _refuse_constant(name, where))
    except RecursionError:
        raise InputError(f"{where} is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:  # what is left of ValueError: Python's limit on the digits of an int
        raise InputError(f"{where} has a number of too many digits") from None


def check_bounded(value: Any, where: str, depth: int = 0) -> None:
    """Refuse what no record has: texts, lists, numbers and nesting beyond all measure.

    Raises:
        InputError: Names the place.
    """
    if depth > _MAX_DEPTH:
        raise InputError(f"{where} is nested too deeply")
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise InputError(f"{where} is too long a text", allowed=f"up to {MAX_TEXT} characters")
    elif isinstance(value, int | float):
        if not math.isfinite(value) or abs(value) > _MAX_INT:
            raise InputError(f"{where} is no number that a record can hold")
    elif isinstance(value, list | dict):
        if len(value) > MAX_ITEMS:
            raise InputError(f"{where} has {len(value)} entries", allowed=f"up to {MAX_ITEMS}")
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            if isinstance(key, str) and len(key) > MAX_TEXT:
                raise InputError(f"{where} has a key that is too long")
            check_bounded(entry, f"{where}, {key}", depth + 1)


def _refuse_constant(name: str, where: str) -> Any:
    raise InputError(f"{where}: benchmark records hold finite numbers or null, never {name}")
