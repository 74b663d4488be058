"""Where in a TOML file a key stands, so that an error can say it."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from cfsp.validation import Location


def key_lines(text: str) -> dict[Location, int]:
    """Every table and key of a valid TOML document -> the line it begins at, counted from 1.

    Statement by statement, each read by tomllib itself: what begins on a line goes on until it can be read alone.
    Keys inside inline tables stand at the line of their statement.
    """
    found: dict[Location, int] = {}
    arrays: Counter[Location] = Counter()
    table: Location = ()
    for number, statement in _statements(text):
        parsed = tomllib.loads(statement)
        if statement.lstrip().startswith("["):
            table = _table(_only_path(parsed), arrays, array=statement.lstrip().startswith("[["))
            found.setdefault(table, number)
            parsed = {}
        for path in _paths(parsed):
            found.setdefault((*table, *path), number)
    return found


def line_of(location: Location, lines: Mapping[Location, int]) -> int | None:
    """The line of a location, or of the nearest table around it; None where there is none."""
    for length in range(len(location), 0, -1):
        if location[:length] in lines:
            return lines[location[:length]]
    return None


def _statements(text: str) -> Iterator[tuple[int, str]]:
    began, held = 1, ""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        began = began if held else number
        held += line
        try:
            tomllib.loads(held)
        except tomllib.TOMLDecodeError:
            continue
        yield began, held
        held = ""


def _only_path(parsed: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a header, which reads as nested tables."""
    names: list[str] = []
    value: Any = parsed
    while value and isinstance(value, dict | list):
        if isinstance(value, list):
            value = value[0]
            continue
        name, value = next(iter(value.items()))
        names.append(name)
    return tuple(names)


def _table(names: tuple[str, ...], arrays: Counter[Location], *, array: bool) -> Location:
    """A header's location: in an array of tables, with the position of its last element."""
    location: Location = ()
    for position, name in enumerate(names, 1):
        location = (*location, name)
        if array and position == len(names):
            arrays[location] += 1
        if arrays[location]:
            location = (*location, arrays[location] - 1)
    return location


def _paths(value: Any, before: Location = ()) -> Iterator[Location]:
    if before:
        yield before
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _paths(inner, (*before, name))
    if isinstance(value, list):
        for position, inner in enumerate(value):
            if isinstance(inner, dict):
                yield from _paths(inner, (*before, position))
