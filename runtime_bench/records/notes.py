"""What a reader must know about a row's figures, in words."""

from __future__ import annotations

from runtime_bench.records import summary
from runtime_bench.records.bench_record import EMULATED, THRASHES, BenchRecord
from runtime_bench.records.energy import energy
from runtime_bench.records.fairness import CAP_LIMIT, capped_at, crowding, stealing, unfair


def note_of(record: BenchRecord) -> str | None:
    """Every remark on a record, or None."""
    notes = (
        "emulated: that it ran counts, its times say nothing" if record.kind == EMULATED else None,
        f"void: what it writes is degenerate ({record.degenerate})" if record.void else None,
        f"{record.fallback} was asked for, and the CPU computed" if record.fallback else None,
        _on_nodes(record),
        _on_memory(record),
        record.throttling.text if record.throttling else None,
        _on_spread(record),
        *_on_conditions(record),
        *_on_energy(record),
    )
    return "; ".join(filter(None, notes)) or None


def _on_nodes(record: BenchRecord) -> str | None:
    """Nodes of a graph that the CPU runs beside another provider: each way there and back copies."""
    providers = record.engine_settings.providers
    if len(providers) < 2 or not providers.get("CPU"):
        return None
    return f"{providers['CPU']} of {sum(providers.values())} nodes of the graph run on the CPU"


def _on_memory(record: BenchRecord) -> str | None:
    if record.memory_verdict != THRASHES or record.memory_limit_bytes is None:
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


def _on_conditions(record: BenchRecord) -> tuple[str | None, ...]:
    found = unfair(record)
    if found is not None:
        return (f"{found.text}: {found.reason}",)
    cap = capped_at(record)
    held = (
        f"clocks were capped at {cap:.0%} of the highest all the time"
        if cap and cap < 1 - CAP_LIMIT
        else None
    )
    return held, stealing(record), crowding(record)


def _on_energy(record: BenchRecord) -> tuple[str | None, ...]:
    """Of rows that have no energy a token by their kind, or failed, nothing is said."""
    found = energy(record)
    if found is None or not (record.ok and record.n_tokens):
        return ()
    if found.reason:
        return (f"no joules a token ({found.meter}): {found.reason}",)
    return ()
