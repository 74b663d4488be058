"""How fast a file is."""

from __future__ import annotations

from pathlib import Path

from cfsp.progress import Progress
from phoneready.frontier.record import Speed
from phoneready.report.plot_style import speed_span
from runtime_bench.measuring.measure import run_bench
from runtime_bench.workload import BenchSettings


def measure_speed(path: Path, settings: BenchSettings, progress: Progress) -> Speed:
    """How fast a file generates on this machine, each sample in a process of its own."""
    record = run_bench([path], settings, progress)[0]
    middle, low, high = speed_span(record) if record.has_speed else (None, None, None)
    return Speed(record.test, record.n_threads, middle, low, high, record.peak_rss_bytes, record.failure)
