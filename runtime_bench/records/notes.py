"""What a reader must know about a row's figures, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime_bench.records import summary
from runtime_bench.records.crowding import crowding, stealing
from runtime_bench.records.thermal import CAP_LIMIT, capped

if TYPE_CHECKING:
    from runtime_bench.records.bench_record import BenchRecord


def note_of(record: BenchRecord) -> str | None:
    """Every remark on a record, or None."""
    notes = (
        _on_kind(record),
        _on_text(record),
        _on_memory(record),
        _on_throttling(record),
        _on_spread(record),
        _on_heat(record),
        stealing(record),
        crowding(record),
    )
    return "; ".join(filter(None, notes)) or None


def _on_kind(record: BenchRecord) -> str | None:
    return "emulated: that it ran counts, its times say nothing" if record.kind == "emulated" else None


def _on_text(record: BenchRecord) -> str | None:
    return f"void: what it writes is degenerate ({record.degenerate})" if record.void else None


def _on_throttling(record: BenchRecord) -> str | None:
    return None if record.throttling is None else record.throttling.text


def _on_memory(record: BenchRecord) -> str | None:
    if record.memory_verdict != "thrashes" or record.memory_limit_bytes is None:
        return None
    again, limit = ((size or 0) / 2**20 for size in (record.reread_bytes, record.memory_limit_bytes))
    return f"thrashes: under the limit of {limit:.0f} MiB, {again:.0f} MiB of the file were read again"


def _on_spread(record: BenchRecord) -> str | None:
    if not record.quarantined_ns or record.spread_limit is None:
        return None
    before, after = summary.spread(record.quarantined_ns) or 0.0, record.spread
    still = after is not None and after > record.spread_limit
    outcome = "still wide" if still else "then within it"
    return f"p90/p50 {before:.2f} over the limit {record.spread_limit:.2f}: measured once more, {outcome}"


def _on_heat(record: BenchRecord) -> str | None:
    low = capped(record.clock_caps)
    if not low:
        return None
    return (
        f"{len(low)} of {len(record.clock_caps)} processes ran with clocks capped by more than {CAP_LIMIT:.0%}, "
        f"down to {min(low):.0%} of the highest"
    )
