"""`phoneready compare` on record files, good and hostile."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phoneready.main import main
from runtime_bench.records.jsonl import append_jsonl, record_to_json
from runtime_bench.records.reported import Contention
from runtime_bench.workload import Workload

BASE_NS = (1000, 1001, 1002, 1003, 1004)
Capture = pytest.CaptureFixture[str]
Write = Callable[..., str]


@pytest.fixture
def write(make_record: Any, tmp_path: Path) -> Write:
    """`write(name, factor, **fields)`: a record file of tg128 whose times are `factor` times the base's."""

    def make(name: str, factor: float = 1.0, **fields: Any) -> str:
        path = tmp_path / f"{name}.jsonl"
        samples = tuple(round(factor * 1000 * ns) for ns in BASE_NS)
        values = {"samples_ns": samples, "model_filename": f"models/{name}.gguf"} | fields
        append_jsonl(path, [make_record(**values)])
        return str(path)

    return make


def test_verdicts_in_every_format(write: Write, capsys: Capture) -> None:
    base, slow = write("dense"), write("slow", 1.2)
    assert main(["compare", base, slow]) == 0
    text = capsys.readouterr().out
    assert "| slower" in text
    assert "beyond 0.03" in text
    assert main(["compare", base, slow, "--format", "csv", "--threshold", "0.5"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["verdict"], row["threshold"], row["target"]) == ("no difference", "0.5", "local")
    for option in (["--json"], ["--format", "json"]):
        assert main(["compare", base, slow, *option]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["kind"], found["schema_version"]) == ("comparison", 1)
        (row,) = found["rows"]
        assert row["verdict"] == "slower"
        assert row["ratio"] == pytest.approx(1 / 1.2, rel=1e-3)
        assert row["new_median_ns"] == 1_202_400


def test_a_gate_is_an_exit_status(write: Write, capsys: Capture) -> None:
    base, slow, same = write("dense"), write("slow", 1.2), write("same")
    assert main(["compare", base, same, "--fail-on", "slower,inconclusive"]) == 0
    assert main(["compare", base, slow, "--fail-on", "inconclusive"]) == 0
    capsys.readouterr()
    assert main(["compare", base, slow, same, "--fail-on", "slower", "--fail-on", "inconclusive"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: 1 of 2 rows: slow.gguf tg128 with 2 threads is slower\n"
    assert "no difference" in captured.out
    noisy = write("noisy", 25.0, contention=(Contention(1e4, 0.0),))
    for verdict in ("inconclusive", "too noisy to tell"):
        assert main(["compare", base, noisy, "--fail-on", verdict]) == 1
        assert "noisy.gguf tg128 with 2 threads is too noisy to tell" in capsys.readouterr().err
    assert main(["compare", base, noisy, "--fail-on", "slower"]) == 0
    assert main(["compare", base, slow, "--fail-on", "ugly"]) == 2
    assert "faster, slower" in capsys.readouterr().err


def test_models_of_one_file_are_held_against_one_of_them(
    write: Write, make_record: Any, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "all.jsonl"
    names = ("dense", "pruned", "tiny")
    append_jsonl(path, [make_record(model_filename=f"/m/{name}.gguf") for name in names])
    assert main(["compare", str(path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["base"], row["new"]) for row in rows] == [
        ("/m/dense.gguf", "/m/pruned.gguf"),
        ("/m/dense.gguf", "/m/tiny.gguf"),
    ]
    assert all(row["paired"] for row in rows)
    assert main(["compare", str(path), write("other"), "--base-model", "pruned.gguf", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["base"], row["new"]) == ("/m/pruned.gguf", "models/other.gguf")
    for arguments in ([str(path), write("one")], [str(path), "--base-model", "nobody"], [write("two")]):
        assert main(["compare", *arguments]) == 2
    assert "/m/tiny.gguf" in capsys.readouterr().err


def test_what_bench_prints_as_json_can_be_compared(make_record: Any, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "bench.json"
    rows = [record_to_json(make_record(model_filename=name)) for name in ("a.gguf", "b.gguf")]
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    assert main(["compare", str(path)]) == 0
    assert "no difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "constrained-host"}, "'measured' and 'constrained-host'"),
        ({"target": "ssh:board"}, "ssh:board"),
        ({"engine": "onnxruntime"}, "onnxruntime"),
        ({"cpu_info": "Another Processor"}, "Another Processor"),
        ({"warmup": False}, "warmup"),
        ({"n_threads": 8}, "without partner"),
    ],
)
def test_what_was_measured_otherwise_is_never_compared(
    write: Write, change: dict[str, Any], message: str, capsys: Capture
) -> None:
    assert main(["compare", write("dense"), write("other", **change)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_a_cold_load_is_not_held_against_a_warm_one(write: Write, make_record: Any, capsys: Capture) -> None:
    load = {"workload": Workload("load")}
    warm = write("warm", page_cache="warm", **load)
    assert main(["compare", warm, write("cold", page_cache="cold", **load)]) == 2
    assert "page_cache" in capsys.readouterr().err
    refused = write("refused", page_cache="warm", page_cache_shares=(0.0,), **load)
    assert main(["compare", warm, refused]) == 0
    assert "new was to be loaded warm, and was cold" in capsys.readouterr().out
    again = write("again", page_cache="warm", page_cache_shares=(0.0,), **load)
    assert main(["compare", refused, again]) == 0
    assert "base was to be loaded warm, and was cold" in capsys.readouterr().out


def test_an_emulators_clock_gives_no_verdict(write: Write, capsys: Capture) -> None:
    files = [write(name, factor, kind="emulated") for name, factor in (("a", 1.0), ("b", 3.0))]
    assert main(["compare", *files, "--json", "--fail-on", "slower"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["verdict"], row["ratio"], row["reason"]) == (
        "inconclusive",
        None,
        "emulated times say nothing",
    )


def test_text_of_a_hostile_record_is_shown_and_not_acted_upon(write: Write, capsys: Capture) -> None:
    name = "\x1b[2J\x9b31m<script>alert(1)<script>[x](javascript:1)|\u202e`.gguf"
    base, evil = write("dense"), write("evil", 2.0, model_filename=name)
    assert main(["compare", base, evil, "--fail-on", "slower"]) == 1
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert "\x1b" not in text
        assert "\x9b" not in text
        assert "\u202e" not in text
    assert "\\<script\\>" in captured.out
    assert "\\[x\\](javascript:1)\\|" in captured.out
    assert {line.count("|") - line.count("\\|") for line in captured.out.splitlines()[:3]} == {12}
    formula = write("formula", model_filename="=HYPERLINK(1)\x1b")
    assert main(["compare", base, formula, "--format", "csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["new"] == "'=HYPERLINK(1)\\x1b"


BAD = {
    "deep": ('{"a":' * 100_000, "nested too deeply"),
    "deep object": ('{"a":[[[[[[[[1]]]]]]]]}', "nested too deeply"),
    "nan": ('{"load_average": NaN}', "no number"),
    "infinite": ('{"load_average": 1e999}', "no number"),
    "digits": ('{"samples_ns": [' + "9" * 5000 + "]}", "too many digits"),
    "large number": ('{"samples_ns": [1e300]}', "no number"),
    "large integer": ('{"samples_ns": [' + "9" * 40 + "]}", "no number"),
    "many samples": ('{"samples_ns": [' + "1," * 20_000 + "1]}", "20001 entries"),
    "long text": ('{"failure": "' + "x" * 100_000 + '"}', "too long"),
    "surrogate": ('{"model_filename": "\\ud800"}', "model_filename"),
    "string for number": ('{"n_threads": "2"}', "n_threads"),
    "truth for number": ('{"n_threads": true}', "n_threads"),
    "negative": ('{"file_size_bytes": -1}', "file_size_bytes"),
    "no threads": ('{"n_threads": 0}', "n_threads"),
    "wrong schema": ('{"schema_version": 99}', "unknown version"),
    "schema of another type": ('{"schema_version": "1"}', "unknown version"),
    "another record": ('{"record_type": "\\u001b[31m"}', "not a benchmark record"),
    "unknown key": ('{"\\u001b[31m": 1}', "unknown keys: \\x1b[31m"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_hostile_record_is_an_error_of_one_line(
    case: str, write: Write, make_record: Any, tmp_path: Path, capsys: Capture
) -> None:
    change, message = BAD[case]
    whole = json.dumps(record_to_json(make_record()))
    # Later keys win, so that the change replaces a field of a valid record.
    path = tmp_path / "bad.jsonl"
    path.write_text(whole[:-1] + ", " + change[1:] + "\n", encoding="utf-8")
    assert main(["compare", write("dense"), str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert len(captured.err) < 2000
    assert "\x1b" not in captured.err


@pytest.mark.parametrize(
    "content", [b"\x00\xff" * 500, b"not json\n", b"[1, 2", b'["a"]', b"[]", b"", b"3\n"]
)
def test_what_is_no_record_file(content: bytes, write: Write, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    assert main(["compare", str(path), write("dense")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_file_without_end_is_not_read_to_it(write: Write, capsys: Capture) -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("no /dev/zero here")
    assert main(["compare", "/dev/zero", write("dense")]) == 2
    assert "too large" in capsys.readouterr().err
