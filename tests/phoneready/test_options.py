"""Options made from declared settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer

from cfsp.errors import InputError
from cfsp.settings import Setting, Settings, setting
from cfsp.units import parse_bytes
from phoneready.commands.options import was_given, with_settings


@dataclass(frozen=True)
class Given(Settings):
    size: tuple[int, ...] = setting((512,), "Sizes.", ge=0, option="-s --size", metavar="N,...")
    ratios: tuple[float, ...] = setting((), "Ratios.", lt=1, metavar="R,...")
    text: tuple[str, ...] = setting(("self",), "Texts.", metavar="REF")
    limit: int | None = setting(None, "Bytes.", parse=parse_bytes, metavar="SIZE")
    warmup: bool = setting(True, "Warm up.", option="--no-warmup", off="Do not warm up.")
    hidden: int = setting(1, "For Python alone.", option=None)


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
        *("-s", "1,2", "--size", "4", "--ratios", "0.5", "--text", "a,b", "--text", "c", "--no-warmup"),
        *("--threads", "3"),
    )
    assert found["given"] == Given(size=(1, 2, 4), ratios=(0.5,), text=("a,b", "c"), warmup=False)
    assert (found["threads"], found["was"]) == (3, True)


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["--size", "1,-2"], "--size: out of range (got -2); allowed: 0 or more"),
        (["--size", "1,x"], "--size: not understood (got '1,x'); allowed: whole numbers"),
        (["--ratios", "0.1,nan"], "--ratios: out of range"),
        (["--size", "9" * 30], "--size: out of range"),
        (["--text", " "], "--text: empty"),
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
