"""Thread counts side by side."""

from __future__ import annotations

from typing import Any

from runtime_bench.presentation.record_table import best_threads, format_sweep
from runtime_bench.workload import Workload


def test_the_best_and_the_curve(make_record: Any) -> None:
    rows = [
        make_record(n_threads=n, samples_ns=(ns,) * 5)
        for n, ns in ((1, 2000), (2, 1000), (4, 1000), (8, 4000))
    ]
    assert best_threads(rows).n_threads == 2
    line = format_sweep(rows).splitlines()[2]
    assert "| 2 " in line
    assert "1: 50%, 2: 100%, 4: 100%, 8: 25%" in line


def test_failures_stay_in_the_curve(make_record: Any) -> None:
    failed = make_record(n_threads=4, status="failed", failure="timeout", samples_ns=())
    assert "2: 100%, 4: failed" in format_sweep([make_record(), failed])
    assert best_threads([failed]) is None
    assert "4: failed" in format_sweep([failed, make_record(n_threads=8, status="failed", samples_ns=())])


def test_void_and_emulated_rows_are_never_the_best(make_record: Any) -> None:
    void = make_record(n_threads=4, samples_ns=(1,) * 5, degenerate="loop")
    assert best_threads([make_record(n_threads=2), void]).n_threads == 2
    assert "4: -" in format_sweep([make_record(), void])
    assert best_threads([make_record(kind="emulated")]) is None


def test_one_count_makes_no_sweep(make_record: Any) -> None:
    assert format_sweep([make_record(), make_record(Workload("load"))]) == ""
    assert format_sweep([]) == ""
