"""Thread counts of a file side by side: which is best, and what the others give."""

from __future__ import annotations

from collections.abc import Sequence

from runtime_bench.presentation.table import short_names, table_of
from runtime_bench.records.bench_record import BenchRecord


def best_threads(records: Sequence[BenchRecord]) -> BenchRecord | None:
    """The fastest of rows that differ in threads alone, by the median; None where none was measured.

    Of rows that are equally fast the one with fewer threads is best.
    """
    measured = [record for record in records if record.has_speed]
    return min(measured, key=lambda r: (r.median_ns, r.n_threads), default=None)


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
        best = best_threads(group)
        row = {"file": names[file]} if len(names) > 1 else {}
        row |= {"test": test, "best threads": str(best.n_threads) if best else "-"}
        row["speed at each, of the best"] = ", ".join(_point(record, best) for record in group)
        rows.append(row)
    return table_of(rows, right=("test",)).markdown()


def _point(record: BenchRecord, best: BenchRecord | None) -> str:
    if not record.has_speed or not record.median_ns or best is None or not best.median_ns:
        return f"{record.n_threads}: {'-' if record.ok else 'failed'}"
    return f"{record.n_threads}: {best.median_ns / record.median_ns:.0%}"
