"""Comparisons as text: Markdown, JSON, CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from cfsp.records import tool_version
from runtime_bench.presentation.markup import escape_markdown
from runtime_bench.presentation.table import as_markdown, csv_cell, short_names
from runtime_bench.records.compare import Comparison
from runtime_bench.records.record import CROWDED_SHARE

SCHEMA_VERSION = 1
_NOTHING = "-"


def format_comparison(comparisons: Sequence[Comparison], output: str = "md") -> str:
    """Comparisons in one of COMPARISON_FORMATS, with a final newline."""
    return COMPARISON_FORMATS[output](comparisons)


def comparison_to_json(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """One JSON object with a row for each comparison."""
    head = {"kind": "comparison", "schema_version": SCHEMA_VERSION, "tool_version": tool_version()}
    return head | {"rows": [asdict(row) for row in comparisons]}


def _as_markdown(comparisons: Sequence[Comparison]) -> str:
    names = short_names(file for c in comparisons for file in (c.base, c.new))
    several = len({(c.kind, c.target, c.engine) for c in comparisons}) > 1
    rows = [
        ({"kind": c.kind, "target": c.target, "engine": c.engine} if several else {})
        | {
            "test": c.test,
            "threads": str(c.n_threads),
            "base": names[c.base],
            "new": names[c.new],
            "speed ratio": _number(c.ratio),
            f"{c.confidence:.0%} interval": _interval(c),
            "peak RSS ratio": _number(c.peak_rss_ratio),
            "size ratio": _number(c.file_size_ratio),
            "verdict": c.verdict + (f" ({c.reason})" if c.reason else ""),
        }
        for c in comparisons
    ]
    return as_markdown(rows) + "".join(f"\n{line}\n" for line in _remarks(comparisons))


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
    crowded = sum(c.basis == "cpu" for c in comparisons)
    if crowded:
        lines.append(
            f"{crowded} of {len(comparisons)} rows are compared by processor time: other programs took the core of a "
            f"single thread for more than {CROWDED_SHARE:.0%} of the time."
        )
    apart = sum(not c.paired for c in comparisons)
    if apart:
        lines.append(
            f"{apart} of {len(comparisons)} rows were not measured in turns: what changed on the machine between the "
            "sessions is in their ratios."
        )
    return lines


def _interval(comparison: Comparison) -> str:
    if comparison.low is None or comparison.high is None:
        return _NOTHING
    return f"{comparison.low:.3f} to {comparison.high:.3f}"


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.3f}"


def _as_json(comparisons: Sequence[Comparison]) -> str:
    return json.dumps(comparison_to_json(comparisons), indent=2, allow_nan=False) + "\n"


def _as_csv(comparisons: Sequence[Comparison]) -> str:
    """A line a comparison; what is unknown is empty."""
    stream = io.StringIO()
    fields = [field.name for field in dataclasses.fields(Comparison)]
    writer = csv.DictWriter(stream, fieldnames=fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in asdict(row).items()} for row in comparisons)
    return stream.getvalue()


COMPARISON_FORMATS: MappingProxyType[str, Callable[[Sequence[Comparison]], str]] = MappingProxyType(
    {"md": _as_markdown, "json": _as_json, "csv": _as_csv}
)
