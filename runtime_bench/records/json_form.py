"""Records of benchmarks as JSON: their fields, and the summaries derived from them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pydantic

from cfsp.errors import InputError
from cfsp.reading import Bounds, check_bounded
from cfsp.records import tool_version
from cfsp.validation import describe_problems
from runtime_bench.records import summary
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.notes import note_of

RECORD_TYPE = "bench"

SCHEMA_VERSION = 1
BOUNDS = Bounds(depth=7, text=8192, items=10_000, magnitude=2**63 - 1)
"""The most that a record holds."""

_DERIVED: MappingProxyType[str, Callable[[BenchRecord], Any]] = MappingProxyType(
    {
        "avg_ns": lambda r: summary.mean(r.samples_ns),
        "stddev_ns": lambda r: summary.stdev(r.samples_ns),
        "median_ns": lambda r: r.median_ns,
        "p90_ns": lambda r: summary.quantile(r.samples_ns, 0.9),
        "p99_ns": lambda r: summary.quantile(r.samples_ns, 0.99),
        "avg_ts": lambda r: r.avg_ts,
        "median_ts": lambda r: r.median_ts,
        "stddev_ts": lambda r: summary.stdev(r.samples_ts),
        "samples_ts": lambda r: list(r.samples_ts),
        "load_ns": lambda r: r.load_ns,
        "page_cache_state": lambda r: r.page_cache_state,
        "peak_rss_bytes": lambda r: r.peak_rss_bytes,
        "spread": lambda r: r.spread,
        "void": lambda r: r.void,
        "note": note_of,
    }
)
_ADAPTER = pydantic.TypeAdapter(BenchRecord)


def record_to_json(record: BenchRecord) -> dict[str, Any]:
    """The JSON object of a record: its fields and the summaries derived from them."""
    head = {"record_type": RECORD_TYPE, "schema_version": SCHEMA_VERSION, "tool_version": tool_version()}
    derived = {name: derive(record) for name, derive in _DERIVED.items()}
    fields: dict[str, Any] = _ADAPTER.dump_python(record, mode="json")
    return head | fields | derived


def record_from_json(payload: Any, *, where: str) -> BenchRecord:
    """Rebuild a record.

    Raises:
        InputError: Not a benchmark record, an unknown schema version, unknown keys, fields that do not validate, or
            more than a record can hold.
    """
    if not isinstance(payload, dict) or payload.get("record_type") != RECORD_TYPE:
        raise InputError(f"{where} is not a benchmark record")
    if payload.get("schema_version") != SCHEMA_VERSION:
        version = payload.get("schema_version")
        raise InputError(
            f"{where}: unknown version", field="schema_version", value=version, allowed=str(SCHEMA_VERSION)
        )
    check_bounded(payload, where, BOUNDS)
    extra = {"record_type", "schema_version", "tool_version", *_DERIVED}
    fields = {key: value for key, value in payload.items() if key not in extra}
    unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(BenchRecord)})
    if unknown:
        raise InputError(f"{where} has unknown keys: {', '.join(unknown)}")
    try:
        # Through JSON: there lists are tuples, but "2" is no number.
        return _ADAPTER.validate_json(json.dumps(fields), strict=True)
    except pydantic.ValidationError as error:
        raise InputError(f"{where}: {describe_problems(error)}") from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
