"""Progress and tables."""

from __future__ import annotations

import io

import pytest

from cfsp.units import format_bytes
from phoneready import console
from phoneready.commands.options import split_names
from runtime_bench.presentation.table import table_of_cells


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_progress_is_silent_for_short_steps() -> None:
    stream = io.StringIO()
    with console.show_progress(stream) as progress:
        for done in range(11):
            progress("reading", done, 10)
    assert stream.getvalue() == ""


def test_plain_progress_mentions_long_steps_and_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 20.0, 25.0, 50.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with console.show_progress(stream) as progress:
        for done in (0, 1, 2, 3, 4):
            progress("reading", done, 4)
    assert stream.getvalue().splitlines() == [
        "reading: 2 of 4, about 20 s left",
        "reading: done in 50 s",
    ]


def test_what_follows_a_colon_may_change_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 20.0, 30.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with console.show_progress(stream) as progress:
        for done, loss in ((1, 3.0), (2, 2.5), (3, 2.25)):
            progress(f"training: loss {loss}", done, 3)
    assert stream.getvalue().splitlines() == [
        "training: loss 2.5: 2 of 3, about 20 s left",
        "training: loss 2.25: done in 30 s",
    ]


def test_bars_are_drawn_on_a_terminal() -> None:
    stream = Terminal()
    with console.show_progress(stream) as progress:
        progress("reading", 1, 2)
        progress("reading", 2, 2)
    assert "reading" in stream.getvalue()


def test_format_bytes() -> None:
    counts = (None, 0, 1023, 1024, 92_871_040)
    assert [format_bytes(count) for count in counts] == ["-", "0 B", "1023 B", "1.0 KiB", "88.6 MiB"]


def test_rows_are_aligned_and_pipes_escaped() -> None:
    lines = table_of_cells(["a", "long"], [["x|y", "1"], ["z", "22"]]).markdown().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "x\\|y" in lines[2]


def test_lists_of_options() -> None:
    assert split_names(["Q4_0,Q8_0", "Q4_0"]) == ("Q4_0", "Q8_0")


def test_results_and_notes_carry_no_escape_codes(capsys: pytest.CaptureFixture[str]) -> None:
    console.write_result("a\x1b[31mb\nc", None, as_json=False)
    console.write_result("", {"a": "\x9b1m"}, as_json=True)
    console.note("x\x07")
    captured = capsys.readouterr()
    assert captured.out == 'a\\u001b[31mb\nc\n{\n  "a": "\\u009b1m"\n}\n'
    assert captured.err == "x\\u0007\n"
    assert "\\<img\\>" in table_of_cells(["a"], [["<img>"]]).markdown()
