"""Rows with quantized key-value caches: measured as asked, said in every row, and never compared with others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import InputError
from runtime_bench.engines import EngineFacts, check_cache
from runtime_bench.measuring.measure import run_bench
from runtime_bench.measuring.text_check import check_text
from runtime_bench.presentation.comparison_table import format_comparison
from runtime_bench.presentation.record_table import record_table
from runtime_bench.records.compare import Incomparable, compare, compare_records
from runtime_bench.records.groups import bench_groups
from runtime_bench.records.jsonl import record_from_json, record_to_json
from runtime_bench.records.reported import EngineSettings
from runtime_bench.targets import Local
from runtime_bench.worker import WorkerRequest, WorkerResult
from runtime_bench.workload import BenchSettings

pytest.importorskip("llama_cpp")

QUICK = BenchSettings(
    check_text=False,
    n_prompt=(24,),
    n_gen=(),
    ttft=(),
    load=False,
    repetitions=1,
    n_threads=(1,),
    timeout_s=120,
)
Q8 = EngineSettings("q8_0", flash_attention=True)


@pytest.fixture(scope="module")
def model(tiny_gguf: Callable[..., Path]) -> Path:
    return tiny_gguf("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=32)


class Deaf(Local):
    """An engine that knows no types of caches."""

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        return WorkerResult(samples_ns=[1000], load_ns=1000, facts=EngineFacts("toy"))


@pytest.mark.parametrize(
    ("asked", "found"), [(None, "f16"), ("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0")]
)
def test_a_row_states_the_cache_that_it_was_measured_with(model: Path, asked: str | None, found: str) -> None:
    (record,) = run_bench([model], replace(QUICK, cache_type=asked))
    assert record.ok, record.failure
    settings = record.engine_settings
    assert (settings.cache_type, settings.flash_attention) == (found, True)
    assert record_table([record]).objects()[0]["cache"] == f"{found}, flash"
    assert record_from_json(record_to_json(record), where="here") == record


def test_a_model_that_cannot_have_the_cache_is_a_failed_row_with_the_reason(
    tiny_gguf: Callable[..., Path],
) -> None:
    (record,) = run_bench([tiny_gguf()], replace(QUICK, cache_type="q8_0"))
    assert not record.ok
    assert "block size 32 does not divide n_embd_head_k=16" in str(record.failure)


def test_an_engine_that_did_not_heed_the_type_has_no_speed(model: Path) -> None:
    (record,) = run_bench([model], replace(QUICK, cache_type="q8_0"), target=Deaf())
    assert (record.status, record.samples_ns) == ("failed", ())
    assert record.failure == "a cache of q8_0 was asked for, and llama.cpp had one that it does not name"
    (record,) = run_bench([model], QUICK, target=Deaf())
    assert record.ok


@pytest.mark.parametrize(
    ("engine", "cache_type", "reason"),
    [
        ("onnxruntime", "q8_0", "onnxruntime cannot be told the type of its cache"),
        ("llama.cpp", "int8", "llama.cpp has no such cache .*allowed: f16, q8_0, q4_0"),
        ("wllama", "q8_0", "wllama cannot be told the type of its cache"),
    ],
)
def test_what_an_engine_cannot_have_is_refused_before_anything_is_measured(
    engine: str, cache_type: str, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        check_cache(engine, cache_type)
    check_cache(engine, None)


def test_the_text_that_is_checked_is_written_with_the_same_cache(
    model: Path, tiny_gguf: Callable[..., Path]
) -> None:
    assert check_text(model, 120, "q4_0").texts
    assert "block size 32" in str(check_text(tiny_gguf(), 120, "q4_0").problem)


def test_unlike_caches_are_held_apart(make_record: Any) -> None:
    floats, older = make_record(engine_settings=EngineSettings("f16")), make_record()
    few = make_record(engine_settings=Q8)
    for other in (floats, older):
        for found in (compare_records(other, few), *compare([other], [few])):
            assert isinstance(found, Incomparable)
            assert "quantized_cache None and 'q8_0'" in found.reason
    assert compare_records(older, floats).verdict == "no difference"
    assert compare_records(few, few).verdict == "no difference"


def test_rows_of_several_caches_find_their_own_partners(make_record: Any) -> None:
    base = [make_record(), make_record(engine_settings=Q8, samples_ns=(2 * 10**9,) * 5)]
    new = [replace(record, model_filename="new.gguf") for record in reversed(base)]
    rows = compare(base, new)
    assert [(row.quantized_cache, row.verdict) for row in rows] == [
        (None, "no difference"),
        ("q8_0", "no difference"),
    ]
    header, _, *lines = format_comparison(rows).splitlines()
    assert "cache" in header
    assert ["floats" in lines[0], "q8_0" in lines[1]] == [True, True]
    assert [group.title for group in bench_groups(base)] == [
        "Measured on local",
        "Measured on local with a cache of q8_0",
    ]


def test_graphs_of_other_floats_are_compared_as_before(make_record: Any) -> None:
    base = make_record(engine="onnxruntime", engine_settings=EngineSettings("f32"))
    new = make_record(engine="onnxruntime", engine_settings=EngineSettings("f16"))
    assert compare_records(base, new).verdict == "no difference"


def test_records_of_earlier_versions_are_read(make_record: Any) -> None:
    payload = record_to_json(make_record())
    del payload["engine_settings"]
    assert record_from_json(payload, where="here").engine_settings == EngineSettings()
