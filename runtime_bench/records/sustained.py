"""How a speed holds over minutes of generation in one process."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from runtime_bench.records.bench_record import BenchRecord

MINUTE_S = 60.0


def curve(record: BenchRecord) -> tuple[tuple[float, float], ...]:
    """(seconds, tokens per second) of each sample, by when it began after the first; empty of other rows."""
    if record.sustained_s is None or not record.samples_ts:
        return ()
    return tuple(zip(_began_s(record), record.samples_ts, strict=True))


def first_minute_ts(record: BenchRecord) -> float | None:
    """Tokens per second of the samples that began within the first minute; None of other rows."""
    return _speed(record, lambda second, whole: second < MINUTE_S)


def last_third_ts(record: BenchRecord) -> float | None:
    """Tokens per second of the samples that began in the last third of the time; None of other rows."""
    return _speed(record, lambda second, whole: second >= whole * 2 / 3)


def _speed(record: BenchRecord, chosen: Callable[[float, float], bool]) -> float | None:
    began = _began_s(record) if curve(record) else ()
    whole = began[-1] + record.samples_ns[-1] / 1e9 if began else 0.0
    times = [ns for second, ns in zip(began, record.samples_ns, strict=False) if chosen(second, whole)]
    return 1e9 * record.n_tokens * len(times) / sum(times) if times else None


def _began_s(record: BenchRecord) -> tuple[float, ...]:
    """When each sample began, by the machine's clock, else by the samples before it."""
    conditions = record.conditions[0] if record.conditions else None
    if conditions and len(conditions.samples_s) == len(record.samples_ns):
        return tuple(began - conditions.samples_s[0][0] for began, _ in conditions.samples_s)
    return tuple(accumulate((ns / 1e9 for ns in record.samples_ns[:-1]), initial=0.0))
