"""First, cold and warm runs by name: measured apart, and never compared with each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import InputError
from runtime_bench.measuring.measure import run_bench
from runtime_bench.presentation.record_table import format_table
from runtime_bench.records.compare import compare, compare_records
from runtime_bench.records.crowding import crowding
from runtime_bench.workload import BenchSettings, Workload, workloads_of

SETTINGS = BenchSettings(
    check_text=False, n_prompt=(), n_gen=(4,), ttft=(16,), start=(16,), repetitions=4, n_threads=(1,), spread_limit=1e9
)  # fmt: skip


def test_names() -> None:
    names = [row.test for row in workloads_of(replace(SETTINGS, regimes=("fresh", "cold", "warm")))]
    assert names[:4] == ["load", "tg4", "ttft16", "start16"]
    assert names[4:8] == ["load @ cold", "tg4 @ cold", "ttft16 @ cold", "start16 @ cold"]
    # A process opens its file but once, and is warm afterwards.
    assert names[8:] == ["tg4 @ warm", "ttft16 @ warm"]
    assert Workload("tg", n_gen=8, n_depth=64, regime="first").test == "tg8 @ d64 @ first"
    with pytest.raises(InputError, match="unknown regime"):
        Workload("tg", n_gen=8, regime="lukewarm")


def test_each_is_measured_as_it_says(tiny_gguf: Callable[..., Path]) -> None:
    pytest.importorskip("llama_cpp")
    settings = replace(SETTINGS, n_gen=(), load=False, regimes=("fresh", "cold", "warm"))
    records = {record.test: record for record in run_bench([tiny_gguf()], settings)}
    assert [record.failure for record in records.values()] == [None] * 5
    fresh, start, cold = records["ttft16"], records["start16"], records["ttft16 @ cold"]
    warm = records["ttft16 @ warm"]
    assert (fresh.warmup, start.warmup, cold.warmup, warm.warmup) == (True, False, False, True)
    assert (fresh.page_cache, start.page_cache, cold.page_cache) == ("as_found", "warm", "cold")
    assert (len(set(fresh.rounds)), len(set(start.rounds)), len(set(cold.rounds))) == (4, 4, 4)
    assert warm.rounds == (0, 0, 0, 1)
    # With the opening, and the processor's clocks of none of it.
    assert all(
        whole > opening for whole, opening in zip(start.samples_ns, start.load_samples_ns, strict=True)
    )
    assert (start.cpu_samples_ns, start.held_samples_ns) == ((), ())
    table = format_table(list(records.values()))
    assert "start16 (warm)" in table
    assert "ttft16 @ cold (" in table


def test_regimes_are_held_apart(make_record: Any) -> None:
    cold = make_record(Workload("tg", n_gen=128, regime="cold"), regime="cold")
    with pytest.raises(InputError, match="regime 'fresh' and 'cold'"):
        compare_records(make_record(), cold)
    with pytest.raises(InputError, match="rows without partner: tg128 @ cold with 2 threads"):
        compare([make_record(), cold], [make_record()])
    assert compare([cold], [cold])[0].test == "tg128 @ cold"


def test_cold_runs_that_were_warm_are_not_judged(make_record: Any) -> None:
    cold = {"regime": "cold", "page_cache": "cold", "page_cache_shares": (0.0,) * 5}
    workload = Workload("tg", n_gen=128, regime="cold")
    record = make_record(workload, **cold)
    assert compare_records(record, record).verdict == "no difference"
    found = compare_records(record, make_record(workload, **(cold | {"page_cache_shares": (1.0,) * 5})))
    assert (found.verdict, found.reason) == ("inconclusive", "new was to be loaded cold, and was warm")


def test_waiting_for_the_disk_is_no_crowd(make_record: Any) -> None:
    slow = {"n_threads": 1, "cpu_samples_ns": (5 * 10**8,) * 5}
    assert crowding(make_record(**slow)) is not None
    assert crowding(make_record(**slow, held_samples_ns=(None,) * 5)) is None


def test_a_first_run_wants_a_machine_that_files_are_pushed_to(tiny_gguf: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="no file is pushed to local"):
        run_bench([tiny_gguf()], replace(SETTINGS, regimes=("first",)))
