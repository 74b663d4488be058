"""Records as text: Markdown in llama-bench's columns, JSON, JSON Lines, CSV. Units are converted only
here."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cfsp.errors import InputError
from runtime_bench.presentation.markup import escape_cell, escape_markdown, lay_out_table, visible
from runtime_bench.records import summary
from runtime_bench.records.json_form import record_to_json
from runtime_bench.records.notes import note_of
from runtime_bench.records.record import EMULATED, BenchRecord

_NOTHING = "-"
"""Shown for what was not measured."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What makes a spreadsheet compute a cell."""

_REASON_WIDTH = 40
"""Letters of a failure's reason inside the table; the whole of it follows below."""


def format_table(records: Sequence[BenchRecord], output: str = "md") -> str:
    """Records in one of FORMATS, with a final newline.

    Raises:
        InputError: Unknown format.
    """
    if output not in FORMATS:
        raise InputError("unknown format", field="output", value=output, allowed=", ".join(FORMATS))
    return FORMATS[output](records)


def table_rows(records: Sequence[BenchRecord]) -> list[dict[str, str]]:
    """The cells of the Markdown table, by column.

    llama-bench's columns, then ours: `time` is the median of a sample, `load` and `peak RSS` belong to the
    row's processes. A column `file` is there when the records are of several files, `target` when they are of several
    targets. Columns are the same in every row.
    """
    names = short_names(record.model_filename for record in records)
    several, targets = len(names) > 1, {record.target for record in records}
    return [
        ({"target": record.target} if len(targets) > 1 else {})
        | ({"file": names[record.model_filename]} if several else {})
        | {name: cell(record) for name, cell in _COLUMNS.items()}
        for record in records
    ]


def short_names(files: Iterable[str]) -> dict[str, str]:
    """Each file's name, with as many of its folders as it takes to tell the files apart."""
    parts = {file: Path(file).parts for file in files}
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {file: str(Path(*path[-depth:])) for file, path in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {file: file for file in parts}


def _number(value: float | None, pattern: str, scale: float = 1.0) -> str:
    return _NOTHING if value is None else pattern.format(value / scale)


def _size(value: int | None) -> str:
    return (
        _number(value, "{:.2f} MiB", 2**20) if (value or 0) < 2**30 else _number(value, "{:.2f} GiB", 2**30)
    )


def _count(value: int | None) -> str:
    return _number(value, "{:.2f} M", 1e6) if (value or 0) < 1e9 else _number(value, "{:.2f} B", 1e9)


def _speed(record: BenchRecord) -> str:
    if not record.ok:
        return "failed: " + textwrap.shorten(record.failure or "no reason", _REASON_WIDTH, placeholder=" ...")
    if record.void:
        return f"void: {record.degenerate}"
    if record.avg_ts is None or record.kind == EMULATED:
        return _NOTHING
    deviation = summary.stdev(record.samples_ts)
    return f"{record.avg_ts:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")


def _time(record: BenchRecord, value: float | None) -> str:
    """An emulator's times are kept in the record and shown to nobody."""
    return _number(None if record.kind == EMULATED else value, "{:.1f} ms", 1e6)


def _test(record: BenchRecord) -> str:
    """The workload; loads say what they found, as a cold load and a warm one are different things."""
    return f"load ({record.page_cache_state})" if record.workload == "load" and record.ok else record.test


_COLUMNS: MappingProxyType[str, Callable[[BenchRecord], str]] = MappingProxyType(
    {
        "model": lambda r: r.model_type or _NOTHING,
        "size": lambda r: _size(r.model_size),
        "params": lambda r: _count(r.model_n_params),
        "backend": lambda r: r.backends or _NOTHING,
        "threads": lambda r: str(r.n_threads),
        "test": _test,
        "t/s": _speed,
        "time": lambda r: _NOTHING if r.void else _time(r, r.median_ns),
        "load": lambda r: _time(r, r.load_ns),
        "peak RSS": lambda r: _size(r.peak_rss_bytes),
    }
)
_RIGHT = frozenset({"size", "params", "threads", "test", "t/s", "time", "load", "peak RSS"})


def _as_markdown(records: Sequence[BenchRecord]) -> str:
    remarks = [(r, text) for r in records for text in (r.failure, note_of(r)) if text]
    names = short_names(record.model_filename for record in records)
    notes = [escape_markdown(f"{names[r.model_filename]}, {r.test}: {text}") for r, text in remarks]
    return as_markdown(table_rows(records)) + "".join(f"\n{note}\n" for note in notes)


def as_markdown(rows: Sequence[dict[str, str]]) -> str:
    """A table with aligned columns; numbers are right-aligned, and cells show their text as it is."""
    if not rows:
        return ""
    names = list(rows[0])
    cells = [[escape_cell(row[name]) for name in names] for row in rows]
    return lay_out_table(names, cells, [i for i, name in enumerate(names) if name in _RIGHT])


def _as_json(records: Sequence[BenchRecord]) -> str:
    payload = [record_to_json(record) for record in records]
    return json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _as_jsonl(records: Sequence[BenchRecord]) -> str:
    lines = (json.dumps(record_to_json(r), ensure_ascii=False, allow_nan=False) for r in records)
    return "".join(f"{line}\n" for line in lines)


def _as_csv(records: Sequence[BenchRecord]) -> str:
    """One line a record; what is no single value is JSON in its cell, unmeasured is empty."""
    if not records:
        return ""
    rows = [record_to_json(record) for record in records]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in rows)
    return stream.getvalue()


def csv_cell(value: Any) -> Any:
    """A value as a spreadsheet takes it: lists as JSON, texts without control characters and never a formula."""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        return visible("'" + value if value[:1] in _FORMULA else value)
    return value


FORMATS: MappingProxyType[str, Callable[[Sequence[BenchRecord]], str]] = MappingProxyType(
    {"md": _as_markdown, "json": _as_json, "jsonl": _as_jsonl, "csv": _as_csv}
)
