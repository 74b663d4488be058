"""First, cold and warm runs by name: measured apart, and never compared with each other."""

from __future__ import annotations

from typing import Any

from runtime_bench.records.compare import Incomparable, compare, compare_records
from runtime_bench.records.fairness import crowding
from runtime_bench.workload import Workload


def test_regimes_are_held_apart(make_record: Any) -> None:
    cold = make_record(Workload("tg", n_gen=128, regime="cold"), regime="cold")
    found = compare_records(make_record(), cold)
    assert isinstance(found, Incomparable)
    assert "regime 'fresh' and 'cold'" in found.reason
    _, alone = compare([make_record(), cold], [make_record()])
    assert isinstance(alone, Incomparable)
    assert "row without partner: tg128 @ cold with 2 threads" in alone.reason
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
