"""Reading what somebody else wrote: size, encoding, depth and numbers are checked before anything else sees it.

Every JSON, JSON Lines and TOML document and every text comes in here; a file that is damaged or hostile ends in one
line that names it.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cfsp.errors import InputError, PhonereadyError

MAX_FILE_BYTES = 256 * 2**20  # of JSON, TOML and records; a plan has some megabytes
MAX_TEXT_BYTES = 2**30  # of a text to calibrate on or measure with
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception's text on one line, cut to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def as_input_error(message: str) -> Iterator[None]:
    """Turn whatever a library says of hostile files, Rust's panics too, into an InputError; wrap no code of ours."""
    try:
        yield
    except (PhonereadyError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{message}: {one_line(error)}") from error


@contextmanager
def panicking_silently() -> Iterator[None]:
    """Discard what is written to descriptor 2, where Rust tells of a panic before Python hears of it."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def read_bytes(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a file; raises InputError if it cannot be read, or is longer than `limit`."""
    try:
        if path.is_fifo() and not path.is_relative_to("/dev"):  # a shell's pipes are there, and have a writer
            raise InputError(f"cannot read {path}: it is a pipe, to which nobody may ever write")
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a name that no file can have
        raise InputError(f"cannot read {str(path)!r}: {error}") from error
    if len(content) > limit:
        raise InputError(f"{path} is too large", allowed=f"up to {limit // 2**20} MiB")
    return content


def read_text(path: Path, limit: int = MAX_FILE_BYTES) -> str:
    """A file as UTF-8 text with newlines as line ends; raises InputError."""
    try:
        text = read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_json(path: Path) -> Any:
    """Read one JSON document; raises InputError."""
    if not path.exists():
        raise InputError(f"{path} does not exist")
    return parse_json(read_text(path), str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """As `read_json`, and the document has to be an object."""
    document = read_json(path)
    if not isinstance(document, dict):
        raise InputError(f"{path} is not a JSON object")
    return document


def read_json_lines(path: Path, limit: int = MAX_FILE_BYTES) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON Lines, each with its place for errors, such as `data.jsonl, line 3`."""
    # Not splitlines: JSON may hold the line separators of Unicode.
    for number, line in enumerate(read_text(path, limit).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            row = parse_json(line, where)
            if not isinstance(row, dict):
                raise InputError(f"{where}: not a JSON object")
            yield where, row


class NotJSONError(InputError):
    """Text that is no complete JSON document, as a write that was cut short leaves it."""


class Bounds(NamedTuple):
    """The most that a document may hold."""

    depth: int = 100  # lists and objects inside one another
    text: float = math.inf  # characters of a text or a key
    items: float = math.inf  # entries of a list or an object
    magnitude: float = 1e300  # of a number


_USUAL = Bounds()


def parse_json(content: str | bytes, where: str, bounds: Bounds = _USUAL) -> Any:
    """Parse one JSON document; raises NotJSONError if it is incomplete, InputError if it is beyond the bounds."""
    try:
        with _parser_limits(where):
            value = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NotJSONError(f"{where} is not valid JSON: {error}") from error
    check_bounded(value, where, bounds)
    return value


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Parse a TOML document; raises InputError if it is none, or beyond the usual bounds."""
    try:
        with _parser_limits(where):
            values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where} is not valid TOML: {error}") from error
    check_bounded(values, where)
    return values


def check_bounded(value: Any, where: str, bounds: Bounds = _USUAL, depth: int = 1) -> None:
    """Raise InputError, which names the place, for what is beyond the bounds, not finite, or has a lone surrogate."""
    if isinstance(value, str):
        if len(value) > bounds.text:
            raise InputError(f"{where} is too long a text", allowed=f"up to {bounds.text} characters")
        if not value.isascii() and _SURROGATE.search(value):
            raise InputError(f"{where} is no text: it has half of a character (a lone surrogate)")
    elif isinstance(value, int | float):
        if not abs(value) <= bounds.magnitude:
            raise InputError(f"{where} is no number that a record can hold", allowed="finite numbers")
    elif isinstance(value, list | dict):
        if depth > bounds.depth:
            raise InputError(f"{where[:200]} is nested too deeply", allowed=f"{bounds.depth} levels")
        if len(value) > bounds.items:
            raise InputError(f"{where} has {len(value)} entries", allowed=f"up to {bounds.items}")
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str):
                check_bounded(key, f"{where}, a key", bounds)
            # Most entries are numbers, of which there can be millions.
            if not (isinstance(entry, int | float) and abs(entry) <= bounds.magnitude):
                check_bounded(entry, f"{where}, {key}", bounds, depth + 1)


@contextmanager
def _parser_limits(where: str) -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise InputError(f"{where} is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        raise
    except ValueError:  # what is left of ValueError: Python's limit on the digits of an int
        raise InputError(f"{where} has a number of too many digits") from None
