"""The JSON form of a record, and its file."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import InputError
from runtime_bench.records.jsonl import append_jsonl, read_jsonl, record_from_json, record_to_json
from runtime_bench.workload import Workload

LLAMA_BENCH_FIELDS = {
    *("build_commit", "cpu_info", "backends", "model_filename", "model_type", "model_size", "model_n_params"),
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
