"""JSON form of frozen dataclasses: versioned, validated, unknown keys refused.

A record class declares `KIND` and `SCHEMA_VERSION` as class variables. On disk the fields stand beside
`kind`, `schema_version` and `tool_version`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeVar, cast

import pydantic

from cfsp.errors import InputError
from cfsp.files import write_json
from cfsp.reading import read_json
from cfsp.validation import describe_problems


class Record(Protocol):
    """A frozen dataclass with a JSON form."""

    KIND: ClassVar[str]
    SCHEMA_VERSION: ClassVar[int]
    __dataclass_fields__: ClassVar[dict[str, Any]]


R = TypeVar("R", bound=Record)
T = TypeVar("T")
Fields = dict[str, Any]


def _shape_of_widths(fields: Fields) -> Fields:
    """FFN widths alone said what a model's shape was, before it had a form of its own."""
    blocks = [{"origin": index, "ffn_width": width} for index, width in enumerate(fields.pop("widths"))]
    return fields | {"shape": {"vocab_size": None, "blocks": blocks}}


def _without_metric(plan: Fields) -> Fields:
    """Plans named the coarse metric, which is always the paper's now, and shares of a budget, which decided nothing."""
    settings = {key: value for key, value in plan["settings"].items() if key != "coarse_metric"}
    return {key: value for key, value in plan.items() if key != "budget"} | {"settings": settings}


def named_loss(training: Fields | None) -> Fields | None:
    """A loss that was not said, `auto`, was distillation through a rounding and the next token without one."""
    if training is None or training.get("loss") != "auto":
        return training
    return training | {"loss": "distill" if training["for_quant"] else "next-token"}


UPGRADES: Mapping[tuple[str, int], Callable[[Fields], Fields]] = MappingProxyType(
    {
        ("checkpoint", 1): _shape_of_widths,
        ("export", 1): _shape_of_widths,
        ("export-manifest", 1): lambda fields: {
            "exports": [_shape_of_widths(dict(e)) for e in fields["exports"]]
        },
        ("pruning_plan", 2): _without_metric,
        ("release-manifest", 3): _shape_of_widths,
    }
)
"""(kind, schema version) -> what makes that version's fields the next one's."""


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
    fields: Fields = pydantic.TypeAdapter(type(value)).dump_python(value, mode="json")
    return fields


def record_from_json(cls: type[R], payload: Any, *, where: str) -> R:
    """Rebuild a record.

    Raises:
        InputError: Another kind, a schema version that is neither known nor upgraded by UPGRADES, or fields that do
            not validate (all are named).
    """
    if not isinstance(payload, dict) or payload.get("kind") != cls.KIND:
        kind = payload.get("kind") if isinstance(payload, dict) else type(payload).__name__
        raise InputError(f"{where} is not a {cls.KIND} file", field="kind", value=kind)
    fields = {k: v for k, v in payload.items() if k not in ("kind", "schema_version", "tool_version")}
    return fields_from_json(cls, _upgraded(cls, fields, payload.get("schema_version"), where), where=where)


def fields_from_json(cls: type[T], fields: Fields, *, where: str) -> T:
    """Build a dataclass from its fields in JSON.

    Raises:
        InputError: Keys that are no fields, or fields that do not validate (all are named).
    """
    unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(cast(Any, cls))})
    if unknown:
        raise InputError(f"{where} has unknown keys: {', '.join(unknown)}")
    try:
        # Through JSON: there lists are tuples, but "2" is no number.
        return pydantic.TypeAdapter(cls).validate_json(json.dumps(fields), strict=True)
    except pydantic.ValidationError as error:
        raise InputError(f"{where}: {describe_problems(error)}") from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _upgraded(cls: type[R], fields: Fields, stated: Any, where: str) -> Fields:
    """Fields of an older schema version as the class has them."""
    version = stated if type(stated) is int else 0
    while version != cls.SCHEMA_VERSION:
        if (cls.KIND, version) not in UPGRADES:
            known = ", ".join(str(v) for kind, v in sorted(UPGRADES) if kind == cls.KIND)
            raise InputError(
                f"{where} has an unknown schema version",
                field="schema_version",
                value=stated,
                allowed=f"{known}, {cls.SCHEMA_VERSION}".removeprefix(", "),
            )
        try:
            fields = UPGRADES[cls.KIND, version](dict(fields))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{where} is no complete {cls.KIND} of schema version {version}") from error
        version += 1
    return fields


def write_record(path: Path, record: Record) -> None:
    """Write a record as JSON, atomically."""
    write_json(path, record_to_json(record))


def read_record(cls: type[R], path: Path) -> R:
    """Read a record; raises InputError as `record_from_json` does."""
    return record_from_json(cls, read_json(path), where=str(path))
