"""The errors that phoneready raises on purpose; the command line turns `exit_code` into the process's status."""

from __future__ import annotations

import importlib.util
import re
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

Row = TypeVar("Row")

_MOST_SHOWN = 300
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel = 3
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 200
_SHOWN.maxlist = _SHOWN.maxtuple = _SHOWN.maxdict = 12


_LOGIN = re.compile(r"(?<=://)(?:[^\s/?#\"']*@|[^\s/:@]+:(?!\d+/)\S*@)")
_SECRET = re.compile(r"(?<=[?&])((?:password|passwd|pwd|token|secret|api_?key)=)[^&#\s\"']*", re.IGNORECASE)
"""Credentials in a URL: before its host, where a password may have a slash, and among its parameters."""


def without_credentials(value: Any) -> Any:
    """A text, or JSON with texts in it, without users, passwords and tokens in URLs."""
    if isinstance(value, dict):
        return {key: without_credentials(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_credentials(one) for one in value]
    return _SECRET.sub(r"\1***", _LOGIN.sub("", value)) if isinstance(value, str) else value


def shown(value: object) -> str:
    """A value as an error shows it: quoted, and cut if it is long or deep."""
    text = _SHOWN.repr(value)
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


class PhonereadyError(Exception):
    """Base of every expected failure; its text is one line that says what is wrong and what would be right."""

    exit_code = 2


class InputError(PhonereadyError):
    """Input or setting that cannot be used; `problem` is the text without the field."""

    def __init__(self, message: str, *, field: str = "", value: object = None, allowed: str = "") -> None:
        self.field, self.value, self.allowed = field, value, allowed
        head = f"{field}: " if field else ""
        got = f" (got {shown(value)})" if value is not None else ""
        tail = f"; allowed: {allowed}" if allowed else ""
        self.problem = without_credentials(f"{message}{got}{tail}")
        super().__init__(head + self.problem)


def look_up(table: Mapping[str, Row], name: str, message: str, *, field: str) -> Row:
    """The row of that name; otherwise raises InputError with the message and the names of all rows."""
    if name not in table:
        raise InputError(message, field=field, value=name, allowed=", ".join(table))
    return table[name]


class MissingExtraError(PhonereadyError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'phoneready[{extra}]'")


def require_extra(package: str, extra: str, distribution: str = "") -> None:
    """Raise MissingExtraError if a package of an extra is not installed; `distribution`: pip's name of it."""
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(distribution or package, extra)


class LimitError(PhonereadyError):
    """A result was computed and misses the limit set for it (parity, budget, gate)."""

    exit_code = 1


class InconclusiveError(PhonereadyError):
    """A result was computed, and its noise leaves open whether it keeps to its limit."""

    exit_code = 3
