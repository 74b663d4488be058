"""JSON form of frozen dataclasses: versioned, validated, unknown keys refused.

A record class declares `KIND` and `SCHEMA_VERSION` as class variables. On disk the fields stand beside
`kind`, `schema_version` and `tool_version`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import pydantic

from cfsp.errors import InputError
from cfsp.files import read_json, write_json
from cfsp.validation import describe_problems


class Record(Protocol):
    """A frozen dataclass with a JSON form."""

    KIND: ClassVar[str]
    SCHEMA_VERSION: ClassVar[int]
    __dataclass_fields__: ClassVar[dict[str, Any]]


R = TypeVar("R", bound=Record)


def tool_version() -> str:
    """Version of the installed phoneready distribution."""
    try:
        return importlib.metadata.version("phoneready")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def record_to_json(record: Record) -> dict[str, Any]:
    """The JSON object of a record."""
    head = {"kind": record.KIND, "schema_version": record.SCHEMA_VERSION, "tool_version": tool_version()}
    fields: dict[str, Any] = pydantic.TypeAdapter(type(record)).dump_python(record, mode="json")
    return head | fields


def record_from_json(cls: type[R], payload: Any, *, where: str) -> R:
    """Rebuild a record.

    Args:
        cls: The record's class.
        payload: Parsed JSON.
        where: File or origin named in errors.

    Raises:
        InputError: Another kind, an unknown schema version, or fields that do not validate (all are named).
    """
    if not isinstance(payload, dict) or payload.get("kind") != cls.KIND:
        kind = payload.get("kind") if isinstance(payload, dict) else type(payload).__name__
        raise InputError(f"{where} is not a {cls.KIND} file", field="kind", value=kind)
    if payload.get("schema_version") != cls.SCHEMA_VERSION:
        raise InputError(
            f"{where} has an unknown schema version",
            field="schema_version",
            value=payload.get("schema_version"),
            allowed=str(cls.SCHEMA_VERSION),
        )
    fields = {k: v for k, v in payload.items() if k not in ("kind", "schema_version", "tool_version")}
    unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise InputError(f"{where} has unknown keys: {', '.join(unknown)}")
    try:
        return pydantic.TypeAdapter(cls).validate_python(fields)
    except pydantic.ValidationError as error:
        raise InputError(f"{where}: {describe_problems(error)}") from error


def write_record(path: Path, record: Record) -> None:
    """Write a record as JSON, atomically."""
    write_json(path, record_to_json(record))


def read_record(cls: type[R], path: Path) -> R:
    """Read a record; raises InputError as `record_from_json` does."""
    return record_from_json(cls, read_json(path), where=str(path))
