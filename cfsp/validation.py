"""Checks by pydantic, and what they found in one line that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_type_hints

import pydantic

from cfsp.errors import InputError, shown

Location = tuple[str | int, ...]  # keys and positions from the outermost to the one at fault
Share = Annotated[float, pydantic.Field(ge=0, le=1)]
WhereSet = pydantic.Field(exclude_if=lambda value: not value)  # leaves an empty field out of a record
Seed = Annotated[int, pydantic.Field(ge=-(2**63), lt=2**63)]
"""What every generator of random numbers takes, and GGUF can store."""
_MOST_PROBLEMS = 20


def describe_problems(
    error: pydantic.ValidationError,
    kind: Any = None,
    line_of: Callable[[Location], str] = lambda location: "",
) -> str:
    """Every problem with its place, such as `prune.ratio: unknown key; seed: missing`.

    `kind`, the class that was validated, lets an unknown key name the nearest known one.
    """
    problems = error.errors(include_url=False)
    told = [line_of(problem["loc"]) + _problem(problem, kind) for problem in problems[:_MOST_PROBLEMS]]
    return "; ".join(told + [f"and {len(problems) - len(told)} more"] * (len(problems) > len(told)))


Kinds = Mapping[str, pydantic.TypeAdapter[Any]]  # key -> what its value has to be


def kinds(*tables: Mapping[str, Any], **expected: Any) -> Kinds:
    """Keys and the annotations of their values; a key of `tables` may be several names with spaces between them."""
    named = {key: kind for table in tables for names, kind in table.items() for key in names.split()}
    return MappingProxyType({key: pydantic.TypeAdapter(kind) for key, kind in (named | expected).items()})


def check_kinds(values: Mapping[str, Any], expected: Kinds, where: str) -> None:
    """Raise InputError for values that are not what their key says (all are named); other keys are let be."""
    problems = []
    for key in expected.keys() & values.keys():
        try:
            expected[key].validate_python(values[key], strict=True)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]  # of a union, those of its other members say the same
            place = place_of((key, *(part for part in first["loc"] if isinstance(part, int))))
            problems.append(_problem(first | {"loc": (place,)}))
    if problems:
        raise InputError(f"{where}: {'; '.join(sorted(problems))}")


def place_of(location: Location) -> str:
    """A location as people write it: `budgets[0].metric`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".") or "file"


def _problem(error: Any, kind: Any = None) -> str:
    place = place_of(error["loc"])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        if kind is None:
            return f"{place}: unknown key"
        *around, key = error["loc"]
        for part in around:
            kind = kind if isinstance(part, int) else get_type_hints(kind)[part]
            while inner := get_args(kind):  # of tuple[X, ...] and X | None
                kind = inner[0]
        known = [name for name in get_type_hints(kind) if not name.startswith("_") and name != "model_config"]
        near = difflib.get_close_matches(key, known, 1)
        return f"{place}: unknown key; " + (
            f"did you mean {near[0]}?" if near else f"allowed: {', '.join(known)}"
        )
    if error["type"] == "dataclass_type":
        return f"{place}: not a table of keys (got {shown(error['input'])})"
    if error["type"] == "missing":
        return f"{place}: missing"
    message = error["msg"].removeprefix("Value error, ")
    got = error["input"]
    complete = isinstance(got, dict | pydantic.BaseModel) or "(got " in message
    return f"{place}: {message}" + ("" if complete else f" (got {shown(got)})")


class Section(pydantic.BaseModel):
    """A part of a configuration file: unknown keys are errors."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


def as_value_error(check: Callable[[], object]) -> None:
    """Let pydantic collect the library's own complaint with all others."""
    try:
        check()
    except InputError as error:
        raise ValueError(str(error)) from error
