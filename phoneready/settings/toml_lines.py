"""Where in a TOML file a key stands, so that an error can say it."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from cfsp.validation import Location

T = TypeVar("T")


def key_lines(text: str) -> dict[Location, int]:
    """Every table and key of a valid TOML document -> the line it begins at, counted from 1.

    Statement by statement, each read by tomllib itself: what begins on a line goes on until it can be read alone.
    Keys inside inline tables stand at the line of their statement.
    """
    line_of: dict[Location, int] = {}
    arrays: Counter[Location] = Counter()
    table: Location = ()
    for number, statement in _statements(text):
        parsed = tomllib.loads(statement)
        if statement.lstrip().startswith("["):
            *_, header = _paths(parsed)
            table = _table(header, arrays, array=statement.lstrip().startswith("[["))
            line_of.setdefault(table, number)
            parsed = {}
        for path in _paths(parsed):
            line_of.setdefault((*table, *path), number)
    return line_of


def nearest(location: Location, known: Mapping[Location, T]) -> T | None:
    """What is known of a location, or of the nearest table around it; None where nothing is."""
    around = (location[:length] for length in range(len(location), 0, -1))
    return next((known[place] for place in around if place in known), None)


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


def _table(header: Location, arrays: Counter[Location], *, array: bool) -> Location:
    """The location of a header, which reads as nested tables: in an array, with the position of its last element."""
    names = [name for name in header if isinstance(name, str)]
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
