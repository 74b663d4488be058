"""Sessions of other days and machines are compared by a file that took turns in each, and by nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phoneready.main import main
from runtime_bench.presentation.comparison_table import format_comparison
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.compare import Incomparable, compare
from runtime_bench.records.jsonl import append_jsonl
from runtime_bench.records.reported import Conditions
from runtime_bench.records.summary import quotient_interval, ratio_interval

ANCHOR = "a" * 64
Sessions = Callable[..., tuple[BenchRecord, BenchRecord]]


@pytest.fixture
def session(make_record: Any) -> Sessions:
    """Factory of the records of one session, a file's and the anchor's; times are of a round, milliseconds."""

    def make(name: str, file_ms: float, anchor_ms: float, **fields: Any) -> tuple[BenchRecord, BenchRecord]:
        drift = (1.0, 1.3, 0.8, 1.6, 1.1, 2.0)
        rows = [
            make_record(
                session=name,
                samples_ns=tuple(int(ms * 1e6 * d) for d in drift),
                sequence=tuple(2 * i + place for i in range(6)),
                anchor_sha256=ANCHOR,
                is_anchor=bool(place),
                file_sha256=sha256,
                model_filename=file,
                **fields,
            )
            for place, (ms, sha256, file) in enumerate(
                [(file_ms, "f" * 64, f"{name}.gguf"), (anchor_ms, ANCHOR, "anchor.gguf")]
            )
        ]
        return rows[0], rows[1]

    return make


def test_what_changes_both_cancels(session: Sessions) -> None:
    old, beside_old = session("old", 1000, 500)
    # Another machine, three times as fast, where the new file is faster by a tenth.
    new, beside_new = session("new", 300, 165, target="ssh:board", cpu_info="Another Processor")
    assert beside_old.is_anchor
    assert not old.is_anchor
    (found,) = compare([old], [new], anchors=[beside_old, beside_new])
    assert found.ratio == pytest.approx(1.1)
    assert found.low == pytest.approx(1.1, rel=0.001)
    assert (found.verdict, found.anchor, found.target) == ("faster", "anchor.gguf", "local, ssh:board")
    assert (found.base_to_anchor, found.new_to_anchor) == (pytest.approx(0.5), pytest.approx(0.55))
    text = format_comparison([found])
    assert "0.500 x anchor" in text
    assert "1 of 1 rows are of sessions that are compared by the anchor" in text
    assert "were not measured in turns" not in text


def test_rounds_of_one_session_need_no_anchor(session: Sessions) -> None:
    old, anchor = session("one", 1000, 500)
    new = replace(old, model_filename="new.gguf", samples_ns=tuple(ns // 2 for ns in old.samples_ns))
    (found,) = compare([old], [new], anchors=[anchor])
    assert (found.anchor, found.paired, found.ratio) == (None, True, pytest.approx(2.0))


@pytest.mark.parametrize("other", [None, "b" * 64])
def test_sessions_without_one_anchor_are_not_compared(session: Sessions, other: str | None) -> None:
    old, beside_old = session("old", 1000, 500)
    new, beside_new = session("new", 900, 500)
    (found,) = compare([old], [replace(new, anchor_sha256=other)], anchors=[beside_old, beside_new])
    assert isinstance(found, Incomparable)
    assert found.reason.startswith("the sessions had different anchors: aaaaaaaaaaaa and")
    (found,) = compare([old], [new], anchors=[beside_old])
    assert isinstance(found, Incomparable)
    assert found.reason == "the anchor's own row is not among the records"


def test_an_anchor_that_was_throttled_says_nothing(session: Sessions) -> None:
    old, beside_old = session("old", 1000, 500)
    new, beside_new = session("new", 900, 500)
    hot = replace(beside_new, conditions=tuple(Conditions((0.0,), caps=(cap,)) for cap in (1.0, *(0.5,) * 5)))
    (found,) = compare([old], [new], anchors=[beside_old, hot])
    assert (found.verdict, found.ratio) == ("too noisy to tell", None)
    assert str(found.reason).startswith("new's anchor: throttled")


def test_the_interval_of_a_quotient_of_quotients() -> None:
    samples, rounds = (10.0, 12.0, 9.0, 11.0, 10.5), tuple(range(5))
    one = quotient_interval((samples, samples), (rounds, rounds), (samples, samples), (rounds, rounds))
    assert (one.ratio, one.low, one.high) == (1.0, 1.0, 1.0)
    ones = (1.0,) * 5
    plain = ratio_interval(samples, ones, paired=True)
    found = quotient_interval((samples, ones), (rounds, rounds), (ones, ones), (rounds, rounds))
    assert (found.ratio, found.low, found.high) == (plain.ratio, plain.low, plain.high)
    inverse = quotient_interval((ones, ones), (rounds, rounds), (samples, ones), (rounds, rounds))
    assert inverse.ratio == pytest.approx(1 / plain.ratio)


def test_the_command_finds_anchors_among_the_records(
    session: Sessions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, file_ms in (("monday", 1000.0), ("friday", 500.0)):
        append_jsonl(tmp_path / f"{name}.jsonl", session(name, file_ms, 400))
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("monday", "friday")]
    assert main(["compare", *paths, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["base"], row["new"], row["anchor"]) == ("monday.gguf", "friday.gguf", "anchor.gguf")
    assert row["ratio"] == pytest.approx(2.0)
