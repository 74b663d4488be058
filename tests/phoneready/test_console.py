"""Progress and tables."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer

from cfsp import progress
from cfsp.errors import InputError
from cfsp.settings import Setting, Settings, setting
from cfsp.units import parse_bytes
from phoneready import console
from phoneready.commands.options import was_given, with_settings
from runtime_bench.presentation.table import table_of_cells


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_progress_mentions_long_steps_and_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(times: list[float], steps: list[tuple[str, int, int]]) -> list[str]:
        clock, stream = iter(times), io.StringIO()
        monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
        with console.show_progress(stream) as shown:
            for step in steps:
                shown(*step)
        return stream.getvalue().splitlines()

    assert shown([0.0] * 11, [("reading", done, 10) for done in range(11)]) == []
    assert shown([0.0, 5.0, 20.0, 25.0, 50.0], [("reading", done, 4) for done in range(5)]) == [
        "reading: 2 of 4, about 20 s left",
        "reading: done in 50 s",
    ]
    assert shown([0.0, 20.0], [("reading", 0, 400), ("reading", 2, 400)]) == [
        "reading: 2 of 400, about 66 min left"
    ]
    # What follows a colon may change within a step.
    losses = ((1, 3.0), (2, 2.5), (3, 2.25))
    assert shown([0.0, 20.0, 30.0], [(f"training: loss {loss}", done, 3) for done, loss in losses]) == [
        "training: loss 2.5: 2 of 3, about 20 s left",
        "training: loss 2.25: done in 30 s",
    ]


def test_bars_are_drawn_on_a_terminal() -> None:
    stream = Terminal()
    with console.show_progress(stream) as shown:
        shown("reading", 1, 2)
        shown("reading", 2, 2)
    assert "reading" in stream.getvalue()


def test_rows_are_aligned_and_pipes_escaped() -> None:
    lines = table_of_cells(["a", "long"], [["x|y", "1"], ["z", "22"]]).markdown().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "x\\|y" in lines[2]


def test_results_and_notes_carry_no_escape_codes(capsys: pytest.CaptureFixture[str]) -> None:
    console.write_result("a\x1b[31mb\nc", None, as_json=False)
    console.write_result("", {"a": "\x9b1m"}, as_json=True)
    console.note("x\x07")
    captured = capsys.readouterr()
    assert captured.out == 'a\\u001b[31mb\nc\n{\n  "a": "\\u009b1m"\n}\n'
    assert captured.err == "x\\u0007\n"
    assert "\\<img\\>" in table_of_cells(["a"], [["<img>"]]).markdown()


@dataclass(frozen=True)
class Given(Settings):
    size: tuple[int, ...] = setting((512,), "Sizes.", ge=0, option="-s --size", metavar="N,...")
    ratios: tuple[float, ...] = setting((), "Ratios.", lt=1, metavar="R,...")
    text: tuple[str, ...] = setting(("self",), "Texts.", metavar="REF")
    limit: int | None = setting(None, "Bytes.", parse=parse_bytes, metavar="SIZE")
    warmup: bool = setting(True, "Warm up.", rare=True)
    rates: tuple[float, ...] = setting((0.5,), "Rates.", gt=0, metavar="R,...", rare=True)
    small: int | None = setting(None, "Bytes.", parse=parse_bytes, rare=True)


def run(*arguments: str) -> dict[str, Any]:
    """What a command with such settings is called with."""
    found: dict[str, Any] = {}
    app = typer.Typer()

    def command(
        context: typer.Context,
        given: Given,
        threads: Annotated[int | None, Setting("Threads.", ge=1, le=9)] = None,
    ) -> None:
        found.update(given=given, threads=threads, was=was_given(context, "size"))

    app.command()(with_settings(command))
    app(list(arguments), standalone_mode=False)
    return found


def test_settings_are_built_from_options() -> None:
    assert run() == {"given": Given(), "threads": None, "was": False}
    found = run(
        *("-s", "1,2", "--size", "4", "--ratios", "0.5", "--text", "a,b", "--text", "c", "--threads", "3"),
        *("--set", "warmup=false", "--set", "rates=1,2", "--set", "small=2 MB", "--set", "rates=3"),
    )
    rest = {"warmup": False, "rates": (1.0, 2.0, 3.0), "small": 2_000_000}
    assert found["given"] == Given(size=(1, 2, 4), ratios=(0.5,), text=("a,b", "c"), **rest)
    assert (found["threads"], found["was"]) == (3, True)


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["--size", "1,-2"], "--size: out of range (got -2); allowed: 0 or more"),
        (["--size", "1,x"], "--size: not understood (got '1,x'); allowed: whole numbers"),
        (["--ratios", "0.1,nan"], "--ratios: out of range"),
        (["--size", "9" * 30], "--size: out of range"),
        (["--text", " "], "--text: empty"),
        (["--set", "rates=0"], "--set rates: out of range (got 0.0); allowed: above 0"),
        (
            ["--set", "warmup=perhaps"],
            "--set warmup: not understood (got 'perhaps'); allowed: a valid boolean",
        ),
        (
            ["--set", "rate=1"],
            "--set: no KEY=VALUE of this command (got 'rate=1'); allowed: warmup, rates, small",
        ),
        (["--set", "rates"], "--set: no KEY=VALUE of this command"),
        (["--threads", "10"], "--threads: out of range (got 10); allowed: 1 to 9"),
    ],
)
def test_what_cannot_be_used_is_named_by_its_option(arguments: list[str], wrong: str) -> None:
    with pytest.raises(InputError) as caught:
        run(*arguments)
    assert wrong in str(caught.value)


def test_an_option_that_two_settings_would_have_is_an_error_of_the_command() -> None:
    def command(given: Given, again: Given) -> None:
        raise AssertionError

    with pytest.raises(TypeError, match=r"command has .*--ratios"):
        with_settings(command)


@dataclass(frozen=True)
class Rates(Settings):
    rates: tuple[float, ...] = setting((0.5,), "Others.", metavar="R,...", rare=True)


def test_a_name_that_two_settings_would_have_is_an_error_of_the_command() -> None:
    def command(given: Given, others: Rates) -> None:
        raise AssertionError

    with pytest.raises(TypeError, match="command has rates twice"):
        with_settings(command)
