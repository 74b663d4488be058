"""What a reader must know about a row's figures, in words."""

from __future__ import annotations

from runtime_bench.records import summary
from runtime_bench.records.bench_record import EMULATED, THRASHES, BenchRecord
from runtime_bench.records.energy import energy
from runtime_bench.records.fairness import CAP_LIMIT, capped_at, crowding, stealing, unfair


def note_of(record: BenchRecord) -> str | None:
    """Every remark on a record, or None."""
    notes: list[str | None] = []
    if record.kind == EMULATED:
        notes.append("emulated: that it ran counts, its times say nothing")
    if record.void:
        notes.append(f"void: what it writes is degenerate ({record.degenerate})")
    if record.fallback:
        notes.append(f"{record.fallback} was asked for, and the CPU computed")
    nodes = record.engine_settings.providers
    if len(nodes) > 1 and nodes.get("CPU"):
        notes.append(f"{nodes['CPU']} of {sum(nodes.values())} nodes of the graph run on the CPU")
    if record.memory_verdict == THRASHES and record.memory_limit_bytes is not None:
        again, limit = ((size or 0) / 2**20 for size in (record.reread_bytes, record.memory_limit_bytes))
        notes.append(
            f"thrashes: under the limit of {limit:.0f} MiB, {again:.0f} MiB of the file were read again"
        )
    notes.append(record.throttling.text if record.throttling else None)
    if record.quarantined_ns and record.spread_limit is not None:
        before, after = summary.spread(record.quarantined_ns) or 0.0, record.spread or 0.0
        outcome = "still wide" if after > record.spread_limit else "then within it"
        notes.append(
            f"p90/p50 {before:.2f} over the limit {record.spread_limit:.2f}: measured once more, {outcome}"
        )
    if found := unfair(record):
        notes.append(f"{found.text}: {found.reason}")
    else:
        if (cap := capped_at(record)) and cap < 1 - CAP_LIMIT:
            notes.append(f"clocks were capped at {cap:.0%} of the highest all the time")
        notes += [stealing(record), crowding(record)]
    if record.ok and record.n_tokens and (account := energy(record)) and account.reason:
        notes.append(f"no joules a token ({account.meter}): {account.reason}")
    return "; ".join(filter(None, notes)) or None
