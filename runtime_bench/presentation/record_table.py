"""Records as text: Markdown in llama-bench's columns, JSON, JSON Lines, CSV. Units are converted only
here. And thread counts of a file side by side, which is best and what the others give."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from cfsp.errors import InputError
from runtime_bench.presentation.markup import escape_markdown
from runtime_bench.presentation.table import NOTHING, Column, Table, indented_json, short_names, table_of
from runtime_bench.records import summary
from runtime_bench.records.bench_record import EMULATED, BenchRecord
from runtime_bench.records.energy import EnergyAccount, energy
from runtime_bench.records.fairness import capped_apart, capped_at, fairness, has_speed
from runtime_bench.records.jsonl import record_to_json, record_to_line
from runtime_bench.records.notes import note_of
from runtime_bench.records.reported import EngineSettings
from runtime_bench.records.sustained import first_minute_ts, last_third_ts

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


def record_table(records: Sequence[BenchRecord]) -> Table[BenchRecord]:
    """The table that people read.

    llama-bench's columns, then ours. `time` is the median of a sample, and `t/s` the speed at that time (in llama-bench
    the samples' mean) with their standard deviation: what comparisons are of, too. `load` and `peak RSS` belong
    to the row's processes. A column `file` is there when the records are of several files, `target` when they are of
    several targets, `minute 1` and `last third` (t/s) when generation was sustained, and those on energy when it was
    metered.
    """
    names = short_names(record.model_filename for record in records)
    columns = (
        [Column[BenchRecord]("target", lambda r: r.target)] if len({r.target for r in records}) > 1 else []
    )
    if len(names) > 1:
        columns.append(Column("file", lambda r: names[r.model_filename]))
    lasting = any(record.sustained_s for record in records)
    metered = any(record.energy for record in records)
    more = (*(_SUSTAINED if lasting else ()), *(_ENERGY if metered else ()))
    return Table([*columns, *_COLUMNS, *more], records)


def speed_text(record: BenchRecord) -> str:
    """The speed at the median time; no figure where degenerate text voids it, or an emulator's clock would say it."""
    if record.void:
        return "void"
    return format_speed(record.median_ts, None if record.kind == EMULATED else record.median_ns)


def format_speed(median_ts: float | None, median_ns: float | None) -> str:
    """Tokens a second where the workload is a rate, else the median time."""
    if median_ns is None:
        return NOTHING
    value, unit = (median_ns / 1e6, "ms") if median_ts is None else (median_ts, "t/s")
    return f"{value:.1f} {unit}" if value >= 10 else f"{value:.3g} {unit}"


def energy_text(account: EnergyAccount | None) -> str | None:
    """Joules a token, with the interval; None where there is none."""
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


def _tells_of_cache(record: BenchRecord) -> bool:
    return record.timed.opens or record.page_cache == "cold"


def _cache(record: BenchRecord) -> str | None:
    """Its type, and that attention ran in a flash kernel, which quantized values need."""
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
        lambda r: f"{r.test} ({r.page_cache_state})" if r.ok and _tells_of_cache(r) else r.test,
        right=True,
    ),
    Column("t/s", _speed, right=True),
    Column("time", lambda r: None if r.void else _time(r, r.median_ns), right=True),
    Column("load", lambda r: _time(r, r.load_ns), right=True),
    Column("peak RSS", lambda r: _size(r.peak_rss_bytes), right=True),
    Column("conditions", lambda r: fairness(r).text),
)


_SUSTAINED: tuple[Column[BenchRecord], ...] = (
    Column("minute 1", lambda r: _number(first_minute_ts(r), "{:.2f}"), right=True),
    Column("last third", lambda r: _number(last_third_ts(r), "{:.2f}"), right=True),
)


_ENERGY: tuple[Column[BenchRecord], ...] = (
    Column("J/token", lambda r: energy_text(energy(r)), right=True),
    Column("energy of", lambda r: found.meter if (found := energy(r)) and found.joules is not None else None),
)


def _as_markdown(records: Sequence[BenchRecord]) -> str:
    remarks = [(r, text) for r in records for text in (r.failure, note_of(r)) if text]
    names = short_names(record.model_filename for record in records)
    notes = [escape_markdown(f"{names[r.model_filename]}, {r.test}: {text}") for r, text in remarks]
    notes += [escape_markdown(line) for line in _settings_lines(records, names)]
    return record_table(records).markdown() + "".join(f"\n{note}\n" for note in notes)


def _settings_lines(records: Sequence[BenchRecord], names: Mapping[str, str]) -> list[str]:
    """How each file was computed, where its engine says it; files that were computed alike share a line."""
    files: dict[str, dict[str, None]] = {}
    for record in records:
        if record.ok and (text := settings_text(record)):
            files.setdefault(text, {})[names[record.model_filename]] = None
    return [f"{', '.join(of)}: {text}" for text, of in files.items()]


def settings_text(record: BenchRecord) -> str:
    """The engine's own settings in words; empty where it says nothing."""
    settings = record.engine_settings
    flash = {True: "flash attention", False: "no flash attention", None: None}[settings.flash_attention]
    copied = settings.rearranged_bytes
    parts = (
        f"{record.engine} on {record.backends}" if record.backends else None,
        f"cores {', '.join(map(str, settings.cores))}" if settings.cores else None,
        flash,
        f"{_size(copied)} of the weights rearranged" if copied else None,
        ", ".join(f"{count} nodes on {name}" for name, count in settings.providers.items()) or None,
        record.environment.system_info,
    )
    return "; ".join(filter(None, parts)) if settings != EngineSettings() else ""


FORMATS: MappingProxyType[str, Callable[[Sequence[BenchRecord]], str]] = MappingProxyType(
    {
        "md": _as_markdown,
        "json": lambda records: indented_json([record_to_json(r) for r in records]),
        "jsonl": lambda records: "".join(map(record_to_line, records)),
        "csv": lambda records: table_of([record_to_json(r) for r in records]).csv(),
    }
)


def best_threads(records: Sequence[BenchRecord]) -> BenchRecord | None:
    """The fastest of rows that differ in threads alone, by the median; None where none was measured.

    Of rows that are equally fast the one with fewer threads is best.
    """
    return min(_ranked(records), key=lambda r: (r.median_ns, r.n_threads), default=None)


def _ranked(records: Sequence[BenchRecord]) -> list[BenchRecord]:
    """Those with a speed, at the clocks of the one that was capped least."""
    measured = [record for record in records if has_speed(record)]
    freest = max(measured, key=lambda r: capped_at(r) or 0, default=None)
    return [r for r in measured if freest is None or not capped_apart(capped_at(r), capped_at(freest))]


def format_sweep(records: Sequence[BenchRecord]) -> str:
    """A Markdown table with a row for each file and test that was measured with several thread counts; empty without
    any."""
    groups: dict[tuple[str, str, str, str], list[BenchRecord]] = {}
    for record in records:
        key = (record.model_filename, record.engine, record.target, record.test)
        groups.setdefault(key, []).append(record)
    names = short_names(record.model_filename for record in records)
    rows = []
    for (file, _, _, test), group in groups.items():
        if len(group) < 2:
            continue
        best, ranked = best_threads(group), _ranked(group)
        row = {"file": names[file]} if len(names) > 1 else {}
        row |= {"test": test, "best threads": str(best.n_threads) if best else "-"}
        row["speed at each, of the best"] = ", ".join(
            _point(record, best if record in ranked else None) for record in group
        )
        rows.append(row)
    return table_of(rows, right=("test",)).markdown()


def _point(record: BenchRecord, best: BenchRecord | None) -> str:
    if not record.median_ns or best is None or not best.median_ns:
        return f"{record.n_threads}: {'-' if record.ok else 'failed'}"
    return f"{record.n_threads}: {best.median_ns / record.median_ns:.0%}"
