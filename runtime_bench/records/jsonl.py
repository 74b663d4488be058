"""Records of benchmarks as JSON, with the summaries derived from them. On disk one a line, appended durably."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cfsp.errors import InputError
from cfsp.files import refuse_no_file, write_text
from cfsp.reading import Bounds, NotJSONError, check_bounded, parse_json, read_bytes
from cfsp.records import fields_from_json, fields_to_json, tool_version
from runtime_bench.records import summary
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.fairness import energy, fairness, note_of

logger = logging.getLogger(__name__)
RECORD_TYPE = "bench"
_HEAD = f'{{"record_type":"{RECORD_TYPE}"'.encode()
SCHEMA_VERSION = 2
BOUNDS = Bounds(depth=7, text=8192, items=10_000, magnitude=2**63 - 1)
"""The most that a record holds."""

_DERIVED: MappingProxyType[str, Callable[[BenchRecord], Any]] = MappingProxyType(
    {
        "avg_ns": lambda r: summary.mean(r.samples_ns),
        "stddev_ns": lambda r: summary.stdev(r.samples_ns),
        "median_ns": lambda r: r.median_ns,
        "p90_ns": lambda r: summary.quantile(r.samples_ns, 0.9),
        "p99_ns": lambda r: summary.quantile(r.samples_ns, 0.99),
        "avg_ts": lambda r: summary.mean(r.samples_ts),
        "median_ts": lambda r: r.median_ts,
        "stddev_ts": lambda r: summary.stdev(r.samples_ts),
        "samples_ts": lambda r: list(r.samples_ts),
        "load_ns": lambda r: r.load_ns,
        "page_cache_state": lambda r: r.page_cache_state,
        "peak_rss_bytes": lambda r: r.peak_rss_bytes,
        "spread": lambda r: r.spread,
        "first_minute_ts": lambda r: r.first_minute_ts,
        "last_third_ts": lambda r: r.last_third_ts,
        "void": lambda r: r.void,
        "joules_per_token": lambda r: found.joules.value if (found := energy(r)) and found.joules else None,
        "fairness": lambda r: asdict(fairness(r)),
        "note": note_of,
    }
)


def record_to_json(record: BenchRecord) -> dict[str, Any]:
    """The JSON object of a record."""
    head = {"record_type": RECORD_TYPE, "schema_version": SCHEMA_VERSION, "tool_version": tool_version()}
    derived = {name: derive(record) for name, derive in _DERIVED.items()}
    return head | fields_to_json(record) | derived


def record_from_json(payload: Any, *, where: str) -> BenchRecord:
    """Rebuild a record. Raises InputError: not a benchmark record, an unknown schema version, unknown keys,
    fields that do not validate, or more than a record can hold."""
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
    return fields_from_json(BenchRecord, fields, where=where)


def record_to_line(record: BenchRecord) -> str:
    """A record as a line of a file of records."""
    return json.dumps(record_to_json(record), ensure_ascii=False, allow_nan=False) + "\n"


def check_appendable(path: Path) -> None:
    """Raise InputError where `append_jsonl` could not write, or would write to what is no file of records."""
    refuse_no_file(path)
    try:
        if not path.exists():
            return
        with path.open("rb") as stream:
            start = stream.read(64).replace(b" ", b"")[: len(_HEAD)]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if not _HEAD.startswith(start):
        raise InputError(f"{path} is no file of records, and none is appended to it")


def append_jsonl(path: Path, records: Iterable[BenchRecord]) -> None:
    """Append records and sync; a last line that a killed process left unfinished is closed first. Raises
    InputError: the file cannot be written."""
    content = "".join(map(record_to_line, records)).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def write_jsonl(path: Path, records: Iterable[BenchRecord]) -> None:
    """Write a file of records anew, atomically."""
    write_text(path, "".join(map(record_to_line, records)))


def read_jsonl(path: Path) -> list[BenchRecord]:
    """Read records in file order: JSON Lines, or the array that `bench --json` prints.

    A line that is no JSON is what a kill left: it is skipped with a warning. Raises InputError: the file
    cannot be read or has no JSON at all, or a line is JSON but no valid record.
    """
    content = read_bytes(path)
    if content.lstrip()[:1] == b"[":
        entries = enumerate(parse_json(content, str(path)), 1)
        return [record_from_json(entry, where=f"{path}, entry {n}") for n, entry in entries]
    records, torn = [], []
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            payload = parse_json(line, where, BOUNDS)
        except NotJSONError:
            torn.append(where)
            continue
        records.append(record_from_json(payload, where=where))
    if torn and not records:
        raise InputError(f"{path} is no file of records: no line is complete JSON")
    for where in torn:
        logger.warning("%s is not complete JSON and is left out", where)
    return records
