"""Checks by pydantic: sections of configuration files, and what was found wrong in one line that a user can act on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pydantic

from cfsp.errors import InputError

Location = tuple[str | int, ...]
"""Keys and positions from the outermost to the one at fault, as pydantic gives them."""


def describe_problems(
    error: pydantic.ValidationError, line_of: Callable[[Location], str] = lambda location: ""
) -> str:
    """Every problem with its place, such as `prune.ratio: unknown key; seed: missing`.

    Args:
        error: What pydantic raised.
        line_of: What to put before a place, such as `line 3: `.
    """
    return "; ".join(line_of(problem["loc"]) + _problem(problem) for problem in error.errors())


def place_of(location: Location) -> str:
    """A location as people write it: `budgets[0].metric`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".") or "file"


def _problem(error: Any) -> str:
    place = place_of(error["loc"])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{place}: unknown key"
    if error["type"] == "dataclass_type":
        return f"{place}: not a table of keys (got {error['input']!r})"
    if error["type"] == "missing":
        return f"{place}: missing"
    message = error["msg"].removeprefix("Value error, ")
    got = error["input"]
    complete = isinstance(got, dict | pydantic.BaseModel) or "(got " in message
    return f"{place}: {message}" + ("" if complete else f" (got {got!r})")


class Section(pydantic.BaseModel):
    """A part of a configuration file: unknown keys are errors."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


def as_value_error(check: Callable[[], object]) -> None:
    """Let pydantic collect the library's own complaint with all others."""
    try:
        check()
    except InputError as error:
        raise ValueError(str(error)) from error
