"""How fast a file is."""

from __future__ import annotations

from pathlib import Path

from cfsp.progress import Progress
from phoneready.frontier.record import Speed
from phoneready.report.plots import speed_span
from runtime_bench.measuring.measure import run_bench
from runtime_bench.records.compare import Comparison, compare_records
from runtime_bench.records.fairness import has_speed
from runtime_bench.workload import BenchSettings


def measure_speed(path: Path, base: Path, settings: BenchSettings, progress: Progress) -> Speed:
    """How fast a file generates on this machine, each sample in a process of its own, in turns with another file.

    Args:
        path: The file.
        base: The other one; may be the same.
        settings: One workload.
        progress: Told about every sample.
    """
    records = {r.model_filename: r for r in run_bench(list(dict.fromkeys((base, path))), settings, progress)}
    record, rival = records[str(path)], records[str(base)]
    middle, low, high = speed_span(record) if has_speed(record) else (None, None, None)
    compared = compare_records(rival, record) if record.ok and rival.ok else None
    comparison = compared if isinstance(compared, Comparison) else None
    return Speed(
        record.test,
        record.n_threads,
        middle,
        low,
        high,
        record.peak_rss_bytes,
        record.failure or rival.failure,
        times=comparison.ratio if comparison else None,
        times_low=comparison.low if comparison else None,
        times_high=comparison.high if comparison else None,
        in_turns=True,
    )
