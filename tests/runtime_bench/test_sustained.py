"""Generation that goes on for a given time: one process, every sample, and how the speed holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import InputError
from cfsp.units import parse_seconds
from runtime_bench import worker
from runtime_bench.measuring.measure import run_bench
from runtime_bench.presentation.record_table import format_table, record_table
from runtime_bench.records.compare import Incomparable, compare_records
from runtime_bench.records.jsonl import record_from_json, record_to_json
from runtime_bench.records.reported import Conditions
from runtime_bench.targets import Local
from runtime_bench.targets.browser import Browser
from runtime_bench.worker import WorkerRequest, WorkerResult
from runtime_bench.workload import BenchSettings, Workload, workloads_of

SUSTAINED = Workload("tg", n_gen=100, regime="sustained")
ONE = {"regime": "sustained", "sustained_s": 180.0, "sequence": (0,) * 9}
# Six samples at 10 t/s and three at 5.
SLOWING = (10 * 10**9,) * 6 + (20 * 10**9,) * 3


@pytest.mark.parametrize(
    ("text", "seconds"), [("10m", 600.0), ("90 s", 90.0), ("45", 45.0), ("1.5h", 5400.0), ("2 min", 120.0)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text, "--sustained") == seconds


def test_times_that_are_none() -> None:
    for text in ("", "ten", "10 d", "-5m", "1m30s"):
        with pytest.raises(InputError, match="--sustained: not understood"):
            parse_seconds(text, "--sustained")


def test_it_is_a_regime_of_generation_alone() -> None:
    settings = BenchSettings(sustained_s=600.0, start=(8,))
    names = [row.test for row in workloads_of(settings)]
    assert names == ["load", "pp512", "tg128", "ttft128", "start8", "tg128 @ sustained"]
    with pytest.raises(InputError, match="--sustained TIME"):
        workloads_of(replace(settings, sustained_s=0.0, regimes=("sustained",)))


class Here(Local):
    """This machine, in this process, with `change` made to each request."""

    def __init__(self, **change: Any) -> None:
        self.change = change

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        result = worker.measure(replace(request, **self.change))
        return replace(result, lasted_ns=None) if self.change else result


LASTING = BenchSettings(
    check_text=False, n_prompt=(), n_gen=(1,), ttft=(), load=False, n_threads=(1,), sustained_s=600.0,
    repetitions=1, spread_limit=1.001,
)  # fmt: skip


def test_what_did_not_last_fails(tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    path = tiny_gguf()
    _, old = run_bench([path], LASTING, target=Here(seconds=0.0))  # a runner of an earlier version
    assert (old.ok, old.sustained_s) == (False, 600.0)
    assert "by number, not for a given time" in str(old.failure)
    monkeypatch.setattr(worker, "MOST_SAMPLES", 3)
    _, full = run_bench([path], LASTING, target=Here())
    assert not full.ok
    assert str(full.failure).startswith("3 samples, which are all that a record holds, took 0.")
    assert "of 600 s" in str(full.failure)


def test_a_page_takes_no_samples_for_a_given_time(tiny_gguf: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"--sustained: browser.* takes samples by number"):
        run_bench([tiny_gguf()], LASTING, target=Browser())


def test_one_process_generates_until_the_time_is_over(tiny_gguf: Callable[..., Path]) -> None:
    pytest.importorskip("llama_cpp")
    _, record = run_bench([tiny_gguf()], replace(LASTING, sustained_s=0.5))
    assert record.failure is None
    assert set(record.rounds) == {0}
    assert len(record.samples_ns) == record.samples_per_process >= 1
    assert record.quarantined_ns == ()
    seconds = [second for second, _ in record.sustained_curve]
    assert seconds == sorted(seconds)
    assert record_from_json(record_to_json(record), where="here") == record


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
