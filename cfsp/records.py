"""JSON form of frozen dataclasses: versioned, validated, unknown keys refused.

A record class declares `KIND` and `SCHEMA_VERSION`, which stand beside its fields, and the tool's version, on disk.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, cast

from cfsp.errors import InputError
from cfsp.files import write_json
from cfsp.reading import read_json


class Record(Protocol):
    """A frozen dataclass with a JSON form."""

    KIND: ClassVar[str]
    SCHEMA_VERSION: ClassVar[int]
    __dataclass_fields__: ClassVar[dict[str, Any]]


R = TypeVar("R", bound=Record)
T = TypeVar("T")
Fields = dict[str, Any]


def tool_version() -> str:
    """Version of the installed phoneready distribution."""
    try:
        return importlib.metadata.version("phoneready")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def record_to_json(record: Record) -> dict[str, Any]:
    """The JSON object of a record."""
    head = {"kind": record.KIND, "schema_version": record.SCHEMA_VERSION, "tool_version": tool_version()}
    return head | fields_to_json(record)


def fields_to_json(value: Any) -> Fields:
    """The fields of a dataclass as JSON has them."""
    import pydantic  # which a measuring process does not load

    fields: Fields = pydantic.TypeAdapter(type(value)).dump_python(value, mode="json")
    return fields


def record_from_json(cls: type[R], payload: Any, *, where: str) -> R:
    """Rebuild a record; raises InputError for another kind or version, and for fields that do not validate."""
    if not isinstance(payload, dict) or payload.get("kind") != cls.KIND:
        kind = payload.get("kind") if isinstance(payload, dict) else type(payload).__name__
        raise InputError(f"{where} is not a {cls.KIND} file", field="kind", value=kind)
    stated, known = payload.get("schema_version"), cls.SCHEMA_VERSION
    if type(stated) is not int or stated != known:
        problem = f"{where} has an unknown schema version"
        raise InputError(problem, field="schema_version", value=stated, allowed=str(known))
    fields = {k: v for k, v in payload.items() if k not in ("kind", "schema_version", "tool_version")}
    return fields_from_json(cls, fields, where=where)


def fields_from_json(cls: type[T], fields: Fields, *, where: str) -> T:
    """Build a dataclass from its fields in JSON; raises InputError for unknown or invalid ones (all are named)."""
    unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(cast(Any, cls))})
    if unknown:
        raise InputError(f"{where} has unknown keys: {', '.join(unknown)}")
    import pydantic

    from cfsp.validation import describe_problems

    try:
        # Through JSON: there lists are tuples, but "2" is no number.
        return pydantic.TypeAdapter(cls).validate_json(json.dumps(fields), strict=True)
    except pydantic.ValidationError as error:
        raise InputError(f"{where}: {describe_problems(error)}") from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def write_record(path: Path, record: Record) -> None:
    """Write a record as JSON, atomically."""
    write_json(path, record_to_json(record))


def read_record(cls: type[R], path: Path) -> R:
    """Read a record; raises InputError as `record_from_json` does."""
    return record_from_json(cls, read_json(path), where=str(path))
