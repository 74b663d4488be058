"""Whether a record's times tell of its file, or of what else ran on the machine."""

from __future__ import annotations

import statistics

from runtime_bench.records.bench_record import BenchRecord

CROWDED_SHARE = 0.1
"""Of their time that threads may go without a core before a row counts as crowded."""


def crowding(record: BenchRecord) -> str | None:
    """Why the clock on the wall tells more of other programs than of the file; None where nothing says so."""
    shares = [share for share in (_waiting(record), _taken(record)) if share is not None]
    # Threads wait a little for each other on an idle machine, too: where both are known, both have to say it.
    share = max(min(shares, default=0.0), _held_up(record))
    return f"other programs took {share:.0%} of the time of its threads" if share > CROWDED_SHARE else None


def stealing(record: BenchRecord) -> str | None:
    """Why its processor time tells no more than the clock: a host took the cores away; None where it did not."""
    known = [one.stolen_cores for one in record.contention if one is not None]
    share = statistics.fmean(known) / record.n_threads if known else 0.0
    taken = f"the host of this machine took {share:.0%} of the time of its threads"
    return taken if share > CROWDED_SHARE else None


def has_processor_time(record: BenchRecord) -> bool:
    """Whether its processor time tells of the file, too. Several threads spend it in waiting for each other, and where
    another chip computes it tells of next to nothing."""
    timed = len(record.cpu_samples_ns) == len(record.samples_ns) > 0
    return timed and record.n_threads == 1 and record.on_processor


def _waiting(record: BenchRecord) -> float | None:
    """Share of their time that its threads waited for a core; more threads than cores wait for each other."""
    if len(record.waited_samples_ns) != len(record.samples_ns) or not record.samples_ns or _too_many(record):
        return None
    return sum(record.waited_samples_ns) / (sum(record.samples_ns) * record.n_threads)


def _taken(record: BenchRecord) -> float | None:
    """Share of the cores that its threads need and others used."""
    known = [one.others_cores + one.stolen_cores for one in record.contention if one is not None]
    cores = record.environment.cpus_usable
    if not known or not cores or _too_many(record):
        return None
    return max(0.0, statistics.fmean(known) + record.n_threads - cores) / record.n_threads


def _held_up(record: BenchRecord) -> float:
    """Share of its time that a single thread did not compute. Of several nobody can tell: they wait for each other; nor
    of one that waits for another chip."""
    if not has_processor_time(record) or None in record.held_samples_ns:  # it waited for the disk
        return 0.0
    return 1 - sum(record.cpu_samples_ns) / sum(record.samples_ns)


def _too_many(record: BenchRecord) -> bool:
    return record.n_threads > (record.environment.cpus_usable or record.n_threads)
