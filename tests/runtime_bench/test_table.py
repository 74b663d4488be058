"""Tables of records."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_bench.presentation.comparison_table import format_comparison
from runtime_bench.presentation.record_table import format_table, record_table
from runtime_bench.presentation.table import (
    Column,
    Markdown,
    Table,
    escape_cell,
    escape_markdown,
    finalize_markdown,
    printable,
    short_names,
    table_of,
    visible,
)
from runtime_bench.records.compare import compare
from runtime_bench.records.jsonl import record_to_json
from runtime_bench.workload import Workload

COLUMNS = [
    "model",
    "size",
    "params",
    "backend",
    "threads",
    "cache",
    "test",
    "t/s",
    "time",
    "load",
    "peak RSS",
    "conditions",
]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_markdown_has_llama_benchs_columns_and_ours(make_record: Any) -> None:
    header, rule, row = format_table([make_record()]).splitlines()
    assert cells(header) == COLUMNS
    assert len(header) == len(rule) == len(row)
    assert cells(row) == [
        *["llama 135M Q8_0", "150.00 MiB", "134.52 M", "CPU", "2", "-", "tg128"],
        *["128.00 ± 9.17", "1000.0 ms", "50.0 ms", "256.00 MiB", "not known"],
    ]


def test_files_of_one_name_show_the_folders_that_tell_them_apart() -> None:
    files = ["a/int4/onnx/model.onnx", "b/int4/onnx/model.onnx"]
    assert short_names(files) == {file: file for file in files}
    assert short_names(["/x/a/m.gguf", "/x/b/m.gguf"]) == {
        "/x/a/m.gguf": "a/m.gguf",
        "/x/b/m.gguf": "b/m.gguf",
    }
    assert short_names(["/x/a.gguf", "/x/b.gguf", "/x/a.gguf"]) == {
        "/x/a.gguf": "a.gguf",
        "/x/b.gguf": "b.gguf",
    }
    assert short_names(["m.gguf", "/x/m.gguf"]) == {"m.gguf": "m.gguf", "/x/m.gguf": "x/m.gguf"}
    assert short_names([]) == {}


def test_what_was_not_measured_is_a_dash(make_record: Any) -> None:
    (row,) = record_table(
        [make_record(peak_rss_samples_bytes=(), load_samples_ns=(), model_n_params=None)]
    ).objects()
    assert (row["peak RSS"], row["load"], row["params"]) == (None, None, None)
    (row,) = record_table([make_record(samples_ns=(10**9,))]).objects()
    assert row["t/s"] == "128.00"


def test_a_failed_row_is_there_with_its_reason(make_record: Any) -> None:
    reason = "timeout: no result after 600 s, | and a very long tale of how it came to that"
    text = format_table([make_record(status="failed", failure=reason, samples_ns=())])
    assert "failed: timeout: no result after 600 s" in text.splitlines()[2]
    assert f"dense.gguf, tg128: {reason}" in text


def test_loads_say_what_they_found_and_repeats_are_remarked(make_record: Any) -> None:
    (row,) = record_table([make_record(Workload("load"), page_cache_shares=(0.0,))]).objects()
    assert row["test"] == "load (cold)"
    record = make_record(quarantined_ns=(1, 2, 3, 4, 50), spread_limit=1.25)
    assert "measured once more, then within it" in format_table([record])


@pytest.mark.parametrize("output", ["json", "jsonl"])
def test_json_forms_hold_whole_records(make_record: Any, output: str) -> None:
    records = [make_record(), make_record(n_threads=4)]
    text = format_table(records, output)
    found = json.loads(text) if output == "json" else [json.loads(line) for line in text.splitlines()]
    assert found == json.loads(json.dumps([record_to_json(r) for r in records]))


def test_csv_has_a_line_a_record(make_record: Any) -> None:
    text = format_table([make_record(), make_record(model_type=None)], "csv")
    first, second = csv.DictReader(io.StringIO(text))
    assert json.loads(first["samples_ns"]) == list(make_record().samples_ns)
    assert float(first["avg_ts"]) == pytest.approx(128.52, abs=0.01)
    assert second["model_type"] == ""


def test_comparisons_show_ratio_interval_and_verdict(make_record: Any) -> None:
    new = make_record(
        model_filename="pruned.gguf", samples_ns=tuple(ns // 2 for ns in make_record().samples_ns)
    )
    header, _, row, *remarks = format_comparison(compare([make_record()], [new])).splitlines()
    found = dict(zip(cells(header), cells(row), strict=True))
    assert found["speed ratio"] == "2.000"
    assert found["95% interval"] == "2.000 to 2.000"
    assert found["verdict"] == "faster"
    assert "beyond 0.03" in " ".join(remarks)


def test_a_table_makes_markdown_csv_and_objects_of_the_same_cells() -> None:
    table = Table(
        [Column("name", lambda r: r[0]), Column("n", lambda r: r[1], right=True)], [("=a|b", 1), ("c", None)]
    )
    assert table.markdown().splitlines() == [
        "| name  | n |",
        "|-------|--:|",
        "| =a\\|b | 1 |",
        "| c     | - |",
    ]
    assert table.csv() == "name,n\n'=a|b,1\nc,\n"
    assert table.objects() == [{"name": "=a|b", "n": 1}, {"name": "c", "n": None}]
    assert table_of(table.objects(), right=("n",)).markdown() == table.markdown()
    assert table_of([]).markdown() == ""


@given(st.text())
def test_nothing_hidden_is_left(text: str) -> None:
    shown = visible(text)
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    shown.encode()


def test_escapes() -> None:
    assert visible("a\x1b[31m\u202eb\tc\r\nd") == "a\\x1b[31m\\u202eb c d"
    assert escape_markdown("Q4_0 <b> [a](b) `c` *d*") == "Q4_0 \\<b\\> \\[a\\](b) \\`c\\` \\*d\\*"
    assert escape_cell("a|b\\|c") == "a\\|b\\\\\\|c"


def test_no_property_asserts_on_time() -> None:
    assert settings().deadline is None


def test_what_is_printed_moves_no_cursor_and_json_stays_json() -> None:
    hostile = "a\x1b[31m\u202eb\x9bc\u2028d\x7f\r\ud800"
    shown = printable(f"{hostile}\tx\ny")
    assert shown == "a\\u001b[31m\\u202eb\\u009bc\\u2028d\\u007f\\r\\ud800\tx\ny"
    assert json.loads(printable(json.dumps({"a": hostile}, ensure_ascii=False))) == {"a": hostile}
    assert printable("naïve 你好 👩‍🚀") == "naïve 你好 👩‍🚀"


def test_markdown_in_cells_and_templates_is_escaped_once() -> None:
    assert escape_cell("<img>|") == "\\<img\\>\\|"
    assert escape_cell(Markdown("**a**|")) == "**a**\\|"
    assert finalize_markdown("[a](b)") == "\\[a\\](b)"
    assert finalize_markdown(Markdown("[a](b)")) == "[a](b)"
    assert finalize_markdown(3) == 3
