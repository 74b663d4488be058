"""What pydantic found wrong, in one line that a user can act on."""

from __future__ import annotations

from typing import Any

import pydantic

__all__ = ["describe_problems"]


def describe_problems(error: pydantic.ValidationError) -> str:
    """Every problem with its place, such as `prune.ratio: unknown key; seed: missing`."""
    return "; ".join(map(_problem, error.errors()))


def _problem(error: Any) -> str:
    place = ".".join(map(str, error["loc"])) or "file"
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key"
    if error["type"] == "missing":
        return f"{place}: missing"
    message = error["msg"].removeprefix("Value error, ")
    got = error["input"]
    return f"{place}: {message}" + ("" if isinstance(got, dict | pydantic.BaseModel) else f" (got {got!r})")
