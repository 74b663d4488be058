"""Rows with quantized key-value caches: measured as asked, said in every row, and never compared with others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime_bench.measuring.text_check import check_text
from runtime_bench.presentation.comparison_table import format_comparison
from runtime_bench.records.compare import Incomparable, bench_groups, compare, compare_records
from runtime_bench.records.jsonl import record_from_json, record_to_json
from runtime_bench.records.reported import EngineSettings

pytest.importorskip("llama_cpp")

Q8 = EngineSettings("q8_0", flash_attention=True)


@pytest.fixture(scope="module")
def model(tiny_gguf: Callable[..., Path]) -> Path:
    return tiny_gguf("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=32)


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
