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


BAD = (
    ('{"a":' * 100_000, "nested too deeply"),
    ('{"a":[[[[[[[[1]]]]]]]]}', "nested too deeply"),
    ('{"load_average": NaN}', "no number"),
    ('{"load_average": 1e999}', "no number"),
    ('{"samples_ns": [' + "9" * 5000 + "]}", "too many digits"),
    ('{"samples_ns": [1e300]}', "no number"),
    ('{"samples_ns": [' + "9" * 40 + "]}", "no number"),
    ('{"samples_ns": [' + "1," * 20_000 + "1]}", "20001 entries"),
    ('{"failure": "' + "x" * 100_000 + '"}', "too long"),
    ('{"model_filename": "\\ud800"}', "model_filename"),
    ('{"n_threads": "2"}', "n_threads"),
    ('{"n_threads": true}', "n_threads"),
    ('{"file_size_bytes": -1}', "file_size_bytes"),
    ('{"n_threads": 0}', "n_threads"),
    ('{"schema_version": 99}', "unknown version"),
    ('{"schema_version": "1"}', "unknown version"),
    ('{"record_type": "\\u001b[31m"}', "not a benchmark record"),
    ('{"\\u001b[31m": 1}', "unknown keys: \\x1b[31m"),
)


def test_a_hostile_record_is_an_error_of_one_line(
    write: Write, make_record: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    whole, path, dense = json.dumps(record_to_json(make_record())), tmp_path / "bad.jsonl", write("dense")
    for change, message in BAD:
        # Later keys win, so that the change replaces a field of a valid record.
        path.write_text(whole[:-1] + ", " + change[1:] + "\n", encoding="utf-8")
        said = refused("compare", dense, path)
        assert message in said
        assert len(said) < 2000
        assert "\x1b" not in said
    for content in (b"\x00\xff" * 500, b"not json\n", b"[1, 2", b'["a"]', b"[]", b"", b"3\n"):
        path.write_bytes(content)
        refused("compare", path, dense)


def test_a_file_without_end_is_not_read_to_it(write: Write, capsys: Capture) -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("no /dev/zero here")
    assert main(["compare", "/dev/zero", write("dense")]) == 2
    assert "too large" in capsys.readouterr().err
