"""Thread counts and depths side by side."""

from __future__ import annotations

from typing import Any

from runtime_bench.presentation.record_table import best_threads, format_depths, format_sweep
from runtime_bench.records.reported import EngineSettings
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


def test_depths_stand_beside_each_other(make_record: Any) -> None:
    def row(kind: str, depth: int, ns: int, **fields: Any) -> Any:
        sizes = {"n_prompt": 512} if kind == "pp" else {"n_gen": 10}
        settings = EngineSettings("q8_0", flash_attention=True)
        workload = Workload(kind, n_depth=depth, **sizes)
        return make_record(workload, samples_ns=(ns,) * 2, engine_settings=settings, **fields)

    rows = [row("tg", depth, ns) for depth, ns in ((4096, 4 * 10**9), (512, 10**9), (1024, 2 * 10**9))]
    failed = row("pp", 1024, 1, status="failed", failure="timeout")
    header, _, tg, pp = format_depths([*rows, row("pp", 512, 10**9), failed, make_record()]).splitlines()
    titles = [cell.strip() for cell in header.strip("|").split("|")]
    assert titles == ["test", "threads", "cache", "t/s @ d512", "t/s @ d1024", "t/s @ d4096"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (tg, pp)]
    assert cells[0] == ["tg10", "2", "q8_0, flash", "10.00 ± 0.00", "5.00 ± 0.00", "2.50 ± 0.00"]
    assert cells[1] == ["pp512", "2", "q8_0, flash", "512.00 ± 0.00", "failed: timeout", "-"]


def test_one_depth_makes_no_table(make_record: Any) -> None:
    assert format_depths([make_record(), make_record(Workload("load"))]) == ""
