"""The JSON form of a record, and its file."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import InputError
from cfsp.units import parse_seconds
from runtime_bench.presentation.record_table import format_table, record_table
from runtime_bench.records.compare import Incomparable, compare_records
from runtime_bench.records.jsonl import append_jsonl, read_jsonl, record_from_json, record_to_json
from runtime_bench.records.reported import Conditions
from runtime_bench.workload import Workload

LLAMA_BENCH_FIELDS = {
    *("cpu_info", "backends", "model_filename", "model_type", "model_size", "model_n_params"),
    *("n_batch", "n_ubatch", "n_threads", "n_prompt", "n_gen", "n_depth", "test_time"),
    *("avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts"),
}


def test_json_has_llama_benchs_fields_and_comes_back(make_record: Any) -> None:
    record = make_record(page_cache_shares=(1.0, None))
    payload = json.loads(json.dumps(record_to_json(record), allow_nan=False))
    assert set(payload) >= LLAMA_BENCH_FIELDS
    assert payload["kind"] == "measured"
    assert payload["avg_ts"] == pytest.approx(sum(128e9 / ns for ns in record.samples_ns) / 5)
    assert payload["peak_rss_bytes"] == 2**28 + 4096
    assert record_from_json(payload, where="here") == record


def test_unmeasured_is_null(make_record: Any) -> None:
    record = make_record(
        status="failed",
        failure="out of memory",
        samples_ns=(),
        sequence=(),
        load_samples_ns=(),
        page_cache_shares=(),
        peak_rss_samples_bytes=(),
        model_type=None,
    )
    payload = record_to_json(record)
    names = (
        "avg_ns",
        "stddev_ns",
        "avg_ts",
        "stddev_ts",
        "load_ns",
        "peak_rss_bytes",
        "p99_ns",
        "model_type",
    )
    assert [payload[name] for name in names] == [None] * len(names)
    assert payload["page_cache_state"] == "unknown"


def test_a_zero_sample_is_refused(make_record: Any) -> None:
    payload = record_to_json(make_record()) | {"samples_ns": [0]}
    with pytest.raises(InputError, match="samples_ns"):
        record_from_json(payload, where="here")


def test_what_is_no_rate_has_no_tokens_per_second(make_record: Any) -> None:
    for workload in (Workload("load"), Workload("ttft", n_prompt=8, n_gen=1)):
        record = make_record(workload)
        assert record_to_json(record)["avg_ts"] is None
        assert record.median_ns == 10**9


def test_summaries_are_derived_and_not_trusted(make_record: Any) -> None:
    payload = record_to_json(make_record()) | {"avg_ts": 1e9}
    found = record_to_json(record_from_json(payload, where="here"))
    assert found["avg_ts"] == pytest.approx(128, rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"record_type": "plan"}, "not a benchmark record"),
        ({"schema_version": 99}, "unknown version"),
        ({"surprise": 1}, "unknown keys: surprise"),
        ({"kind": "guessed"}, "kind"),
        ({"test": "tg64"}, "test"),
        ({"n_threads": "many"}, "n_threads"),
    ],
)
def test_what_is_wrong_is_named(make_record: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        record_from_json(record_to_json(make_record()) | change, where="here")


@pytest.mark.parametrize(
    ("shares", "state"),
    [((1.0, 1.0), "warm"), ((0.0, 0.0), "cold"), ((0.0, 1.0), "mixed"), ((1.0, None), "unknown")],
)
def test_page_cache_state(make_record: Any, shares: tuple[float | None, ...], state: str) -> None:
    assert make_record(page_cache_shares=shares).page_cache_state == state


def test_file_keeps_order_over_appends(make_record: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "records.jsonl"
    records = [make_record(n_threads=n) for n in (1, 2, 4)]
    append_jsonl(path, records[:1])
    append_jsonl(path, records[1:])
    assert read_jsonl(path) == records


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_torn_last_line_is_left_out_and_swallows_nothing(
    make_record: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, share: float
) -> None:
    path = tmp_path / "records.jsonl"
    first, second, third = (make_record(n_threads=n) for n in (1, 2, 4))
    append_jsonl(path, [first])
    whole = path.stat().st_size
    append_jsonl(path, [second])
    with path.open("rb+") as stream:
        stream.truncate(whole + int((path.stat().st_size - whole - 1) * share))
    with caplog.at_level(logging.WARNING):
        assert read_jsonl(path) == [first]
    assert "line 2" in caplog.text
    append_jsonl(path, [third])
    assert read_jsonl(path) == [first, third]


def test_files_that_cannot_be_used(make_record: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="cannot write"):
        append_jsonl(tmp_path, [make_record()])
    path = tmp_path / "nan.jsonl"
    append_jsonl(path, [make_record()])
    path.write_text(path.read_text().replace('"load_average": 0.5', '"load_average": NaN'))
    with pytest.raises(InputError, match="no number"):
        read_jsonl(path)


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
