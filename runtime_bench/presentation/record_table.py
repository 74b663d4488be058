"""Records as text: Markdown in llama-bench's columns, JSON, JSON Lines, CSV. Units are converted only here."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from types import MappingProxyType

from cfsp.errors import InputError
from runtime_bench.presentation.table import (
    NOTHING,
    Column,
    Table,
    escape_markdown,
    indented_json,
    short_names,
    table_of,
)
from runtime_bench.records import summary
from runtime_bench.records.bench_record import EMULATED, BenchRecord
from runtime_bench.records.fairness import EnergyAccount, energy, fairness, note_of
from runtime_bench.records.jsonl import record_to_json, record_to_line
from runtime_bench.records.reported import EngineSettings

_REASON_WIDTH = 40
"""Letters of a failure's reason inside the table; the whole of it follows below."""


def format_table(records: Sequence[BenchRecord], output: str = "md") -> str:
    """Records in one of FORMATS, with a final newline. Raises InputError: unknown format."""
    if output not in FORMATS:
        raise InputError("unknown format", field="output", value=output, allowed=", ".join(FORMATS))
    return FORMATS[output](records)


def record_table(records: Sequence[BenchRecord]) -> Table[BenchRecord]:
    """The table that people read: llama-bench's columns, then ours, those of several targets or files, sustained
    generation and energy only if there are any.

    `time` is the median of a sample, `t/s` the speed at that time (llama-bench: the samples' mean) with their standard
    deviation.
    """
    names = short_names(record.model_filename for record in records)
    columns: list[Column[BenchRecord]] = []
    if len({r.target for r in records}) > 1:
        columns.append(Column("target", lambda r: r.target))
    if len(names) > 1:
        columns.append(Column("file", lambda r: names[r.model_filename]))
    columns += _COLUMNS
    if any(record.sustained_s for record in records):
        columns.append(Column("minute 1", lambda r: _number(r.first_minute_ts, "{:.2f}"), right=True))
        columns.append(Column("last third", lambda r: _number(r.last_third_ts, "{:.2f}"), right=True))
    if any(record.energy for record in records):
        columns.append(Column("J/token", lambda r: energy_text(energy(r)), right=True))
        columns.append(Column("energy of", lambda r: a.meter if (a := energy(r)) and a.joules else None))
    return Table(columns, records)


def speed_text(record: BenchRecord) -> str:
    """The speed at the median time; no figure by an emulator's clock, or if degenerate text voids it."""
    if record.void:
        return "void"
    return format_speed(record.median_ts, None if record.kind == EMULATED else record.median_ns)


def format_speed(median_ts: float | None, median_ns: float | None) -> str:
    """Tokens a second if the workload is a rate, else the median time."""
    if median_ns is None:
        return NOTHING
    value, unit = (median_ns / 1e6, "ms") if median_ts is None else (median_ts, "t/s")
    return f"{value:.1f} {unit}" if value >= 10 else f"{value:.3g} {unit}"


def energy_text(account: EnergyAccount | None) -> str | None:
    """Joules a token with the interval, or None."""
    joules = account.joules if account else None
    return f"{joules.value:.3g} ({joules.low:.3g} to {joules.high:.3g})" if joules else None


def _number(value: float | None, pattern: str, scale: float = 1.0) -> str | None:
    return None if value is None else pattern.format(value / scale)


def _size(value: int | None) -> str | None:
    pattern, scale = ("{:.2f} MiB", 2**20) if (value or 0) < 2**30 else ("{:.2f} GiB", 2**30)
    return _number(value, pattern, scale)


def _count(value: int | None) -> str | None:
    return _number(value, "{:.2f} M", 1e6) if (value or 0) < 1e9 else _number(value, "{:.2f} B", 1e9)


def _speed(record: BenchRecord) -> str | None:
    if not record.ok:
        return "failed: " + textwrap.shorten(record.failure or "no reason", _REASON_WIDTH, placeholder=" ...")
    if record.void:
        return f"void: {record.degenerate}"
    if record.median_ts is None or record.kind == EMULATED:
        return None
    deviation = summary.stdev(record.samples_ts)
    return f"{record.median_ts:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")


def _time(record: BenchRecord, value: float | None) -> str | None:
    """An emulator's times are kept in the record and shown to nobody."""
    return _number(None if record.kind == EMULATED else value, "{:.1f} ms", 1e6)


def _cache(record: BenchRecord) -> str | None:
    settings = record.engine_settings
    return settings.cache_type and settings.cache_type + (", flash" if settings.flash_attention else "")


_COLUMNS: tuple[Column[BenchRecord], ...] = (
    Column("model", lambda r: r.model_type),
    Column("size", lambda r: _size(r.model_size), right=True),
    Column("params", lambda r: _count(r.model_n_params), right=True),
    Column("backend", lambda r: f"{r.backends} (not {r.fallback})" if r.fallback else r.backends),
    Column("threads", lambda r: r.n_threads, right=True),
    Column("cache", _cache),
    # Loads say what they found: a cold load and a warm one are different things.
    Column(
        "test",
        lambda r: (
            r.test
            + (f" ({r.page_cache_state})" if r.ok and (r.timed.opens or r.page_cache == "cold") else "")
        ),
        right=True,
    ),
    Column("t/s", _speed, right=True),
    Column("time", lambda r: None if r.void else _time(r, r.median_ns), right=True),
    Column("load", lambda r: _time(r, r.load_ns), right=True),
    Column("peak RSS", lambda r: _size(r.peak_rss_bytes), right=True),
    Column("conditions", lambda r: fairness(r).text),
)


def _as_markdown(records: Sequence[BenchRecord]) -> str:
    remarks = [(r, text) for r in records for text in (r.failure, note_of(r)) if text]
    names = short_names(record.model_filename for record in records)
    notes = [f"{names[r.model_filename]}, {r.test}: {text}" for r, text in remarks]
    computed: dict[str, dict[str, None]] = {}  # files that were computed alike share a line
    for record in records:
        settings = record.engine_settings
        if record.ok and settings != EngineSettings():
            flash = {True: "flash attention", False: "no flash attention", None: None}[
                settings.flash_attention
            ]
            copied = settings.rearranged_bytes
            parts = (
                f"{record.engine} on {record.backends}" if record.backends else None,
                f"cores {', '.join(map(str, settings.cores))}" if settings.cores else None,
                flash,
                f"{_size(copied)} of the weights rearranged" if copied else None,
                ", ".join(f"{count} nodes on {name}" for name, count in settings.providers.items()) or None,
                record.environment.system_info,
            )
            computed.setdefault("; ".join(filter(None, parts)), {})[names[record.model_filename]] = None
    notes += [f"{', '.join(files)}: {text}" for text, files in computed.items() if text]
    return record_table(records).markdown() + "".join(f"\n{escape_markdown(note)}\n" for note in notes)


FORMATS: MappingProxyType[str, Callable[[Sequence[BenchRecord]], str]] = MappingProxyType(
    {
        "md": _as_markdown,
        "json": lambda records: indented_json([record_to_json(r) for r in records]),
        "jsonl": lambda records: "".join(map(record_to_line, records)),
        "csv": lambda records: table_of([record_to_json(r) for r in records]).csv(),
    }
)
