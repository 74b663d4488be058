"""Comparisons as text: Markdown, JSON, CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from types import MappingProxyType
from typing import Any

from cfsp.records import tool_version
from runtime_bench.presentation.record_table import format_speed
from runtime_bench.presentation.table import (
    NOTHING,
    Column,
    Table,
    escape_markdown,
    indented_json,
    short_names,
    table_of,
)
from runtime_bench.records.bench_record import EMULATED
from runtime_bench.records.compare import Compared, Comparison, Incomparable
from runtime_bench.records.fairness import CROWDED_SHARE

SCHEMA_VERSION = 1
NOT_COMPARABLE = "not comparable"
"""What stands in place of a verdict, or of a ratio."""


def format_comparison(comparisons: Sequence[Compared], output: str = "md") -> str:
    """Comparisons in one of COMPARISON_FORMATS, with a final newline."""
    return COMPARISON_FORMATS[output](comparisons)


def comparison_table(comparisons: Sequence[Comparison]) -> Table[Comparison]:
    """The table that people read; kind, target, engine and cache are columns if rows differ in them."""
    names = short_names(file for c in comparisons for file in (c.base, c.new))
    several = len({(c.kind, c.target, c.engine, c.quantized_cache) for c in comparisons}) > 1
    confidence = f"{' or '.join(dict.fromkeys(f'{c.confidence:.0%}' for c in comparisons))} interval"
    energy: tuple[Column[Comparison], ...] = (
        Column("J/token ratio", lambda c: _number(c.energy.ratio) if c.energy else None),
        Column("it lies in", lambda c: _interval(c.energy.low, c.energy.high) if c.energy else None),
    )
    columns: tuple[Column[Comparison], ...] = (
        Column("test", lambda c: c.test, right=True),
        Column("threads", lambda c: c.n_threads, right=True),
        Column("base", lambda c: names[c.base]),
        Column("new", lambda c: names[c.new]),
        Column("base speed", lambda c: speeds_text(c)[0], right=True),
        Column("new speed", lambda c: speeds_text(c)[1], right=True),
        Column("speed ratio", lambda c: _number(c.ratio)),
        Column(confidence, lambda c: _interval(c.low, c.high)),
        Column("peak RSS ratio", lambda c: _number(c.peak_rss_ratio)),
        Column("size ratio", lambda c: _number(c.file_size_ratio)),
        *(energy if any(c.energy for c in comparisons) else ()),
        Column("verdict", lambda c: c.verdict + (f" ({c.reason})" if c.reason else "")),
    )
    place: tuple[Column[Comparison], ...] = (
        Column("kind", lambda c: c.kind),
        Column("target", lambda c: c.target),
        Column("engine", lambda c: c.engine),
        Column("cache", lambda c: c.quantized_cache or "floats"),
    )
    return Table([*(place if several else ()), *columns], comparisons)


def speeds_text(comparison: Comparison) -> tuple[str, str]:
    """The speeds of base and new whose quotient the ratio is; none by an emulator's clock."""
    c = comparison
    if c.kind == EMULATED:
        return NOTHING, NOTHING
    if c.anchor is not None:
        base, new = (
            NOTHING if value is None else f"{value:.3f} x anchor"
            for value in (c.base_to_anchor, c.new_to_anchor)
        )
        return base, new
    return format_speed(c.base_median_ts, c.base_median_ns), format_speed(c.new_median_ts, c.new_median_ns)


def incomparable_text(row: Incomparable) -> str:
    """Which rows are not compared, and why, in one line."""
    names = short_names(filter(None, (row.base, row.new)))
    files = " and ".join(names[name] for name in (row.base, row.new) if name is not None)
    threads = f"{row.n_threads} thread{'s' if row.n_threads > 1 else ''}"
    return f"{row.test} with {threads} of {files}: {NOT_COMPARABLE}: {row.reason}"


def _as_markdown(compared: Sequence[Compared]) -> str:
    comparisons = [row for row in compared if isinstance(row, Comparison)]
    apart = [escape_markdown(incomparable_text(row)) for row in compared if isinstance(row, Incomparable)]
    table = comparison_table(comparisons).markdown()
    return table + "".join(f"\n{line}\n" for line in (*_remarks(comparisons), *apart))


def _remarks(comparisons: Sequence[Comparison]) -> list[str]:
    """What the ratios are of, and what stands in the way of trusting them."""
    if not comparisons:
        return []
    places = dict.fromkeys(f"{c.kind}, {c.target}, {c.engine}" for c in comparisons)
    thresholds = dict.fromkeys(f"{c.threshold:.3g}" for c in comparisons)
    lines = [
        f"Speed of new / speed of base, by medians ({escape_markdown('; '.join(places))}). A difference is a whole "
        f"interval beyond {' or '.join(thresholds)}."
    ]
    counts = {
        "are compared by processor time: other programs took the core of a single thread for more than "
        f"{CROWDED_SHARE:.0%} of the time.": sum(c.basis == "cpu" for c in comparisons),
        "were not measured in turns: what changed on the machine between the sessions is in their ratios.": sum(
            not c.paired and c.anchor is None for c in comparisons
        ),
        "are of sessions that are compared by the anchor that was measured in turns in each: speeds are multiples of "
        "its speed.": sum(c.anchor is not None for c in comparisons),
    }
    lines += [f"{count} of {len(comparisons)} rows {what}" for what, count in counts.items() if count]
    metered = [(c.test, c.energy) for c in comparisons if c.energy]
    if meters := dict.fromkeys(one.meter for _, one in metered if one.meter):
        told = f"Joules a token of new / those of base, all that each meter told: {'; '.join(meters)}."
        lines.append(escape_markdown(told))
    whys = dict.fromkeys(f"{test}: no ratio of energy: {one.reason}" for test, one in metered if one.reason)
    return lines + list(map(escape_markdown, whys))


def _interval(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _objects(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """A row each; of what is not comparable all but test, threads, files and reason is null."""
    unknown = dict.fromkeys(field.name for field in fields(Comparison)) | {"verdict": NOT_COMPARABLE}
    return [(unknown if isinstance(row, Incomparable) else {}) | asdict(row) for row in compared]


COMPARISON_FORMATS: MappingProxyType[str, Callable[[Sequence[Compared]], str]] = MappingProxyType(
    {
        "md": _as_markdown,
        "json": lambda compared: indented_json(
            {"kind": "comparison", "schema_version": SCHEMA_VERSION, "tool_version": tool_version()}
            | {"rows": _objects(compared)}
        ),
        "csv": lambda compared: table_of(_objects(compared)).csv(),
    }
)
