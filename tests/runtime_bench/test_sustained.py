"""Generation that goes on for a given time: one process, every sample, and how the speed holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cfsp.units import parse_seconds
from runtime_bench.presentation.record_table import format_table, record_table
from runtime_bench.records.compare import Incomparable, compare_records
from runtime_bench.records.reported import Conditions
from runtime_bench.workload import Workload

SUSTAINED = Workload("tg", n_gen=100, regime="sustained")
ONE = {"regime": "sustained", "sustained_s": 180.0, "sequence": (0,) * 9}
# Six samples at 10 t/s and three at 5.
SLOWING = (10 * 10**9,) * 6 + (20 * 10**9,) * 3


@pytest.mark.parametrize(
    ("text", "seconds"), [("10m", 600.0), ("90 s", 90.0), ("45", 45.0), ("1.5h", 5400.0), ("2 min", 120.0)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text, "--sustained") == seconds


def test_minute_one_and_the_last_third(make_record: Any) -> None:
    record = make_record(SUSTAINED, samples_ns=SLOWING, samples_per_process=9, **ONE)
    assert [second for second, _ in record.sustained_curve] == [0, 10, 20, 30, 40, 50, 60, 80, 100]
    assert record.first_minute_ts == pytest.approx(10.0)
    assert record.last_third_ts == pytest.approx(5.0)
    row = record_table([make_record(), record]).objects()[1]
    assert (row["minute 1"], row["last third"]) == ("10.00", "5.00")
    assert "minute 1" not in format_table([make_record()])
    other = make_record()
    assert (other.sustained_curve, other.first_minute_ts, other.last_third_ts) == ((), None, None)


def test_the_machines_clock_says_when_samples_began(make_record: Any) -> None:
    spans = tuple((30.0 * i + 2, 30.0 * i + 12) for i in range(9))
    seen = Conditions((0.0, 300.0), spans, hottest_c=(40.0, 80.0), clocks=(1.0, 0.5))
    record = make_record(SUSTAINED, samples_ns=SLOWING, conditions=(seen,), **ONE)
    assert [second for second, _ in record.sustained_curve] == [30.0 * i for i in range(9)]


def test_other_times_are_not_compared(make_record: Any) -> None:
    record = make_record(SUSTAINED, samples_ns=SLOWING, **ONE)
    found = compare_records(record, replace(record, sustained_s=600.0))
    assert isinstance(found, Incomparable)
    assert "sustained_s 180.0 and 600.0" in found.reason
