"""The generated pages are up to date, and links inside the documentation lead somewhere."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from phoneready.main import COMMANDS, app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]


def test_the_table_of_metrics_is_what_the_program_reads(script: Callable[[str], ModuleType]) -> None:
    written = (ROOT / "docs" / "release.md").read_text(encoding="utf-8")
    assert script("tools/metric_docs").document(written) == written
    assert "| `kl_mean` |" in written


def test_the_command_line_page_is_what_the_help_pages_say(script: Callable[[str], ModuleType]) -> None:
    module = script("tools/command_line_docs")
    written = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    # Typer's versions lay the page out differently; what must agree is what it says.
    assert _options(written) == _options(module.document())


def test_links_lead_somewhere() -> None:
    found = [(page, t) for page in PAGES for t in re.findall(r"\]\(([^)\s]+)", page.read_text("utf-8"))]
    assert not [
        f"{page.name}: {t}" for page, t in found if "://" not in t and not _leads(page, *t.split("#", 1))
    ]


def test_sources_that_a_page_names_are_there() -> None:
    folders = ("cfsp", "exporters", "runtime_bench", "phoneready", "tests", "benchmarks", "examples", "tools")
    there = [f"/{p.relative_to(ROOT)}" for name in folders for p in (ROOT / name).rglob("*.*")]
    named = [
        (page.name, f"/{file}")
        for page in PAGES
        for file in re.findall(r"`((?!FILE)[\w/]+\.(?:py|cpp|swift|kt|yml))[`: ]", page.read_text("utf-8"))
    ]
    assert len(named) > 40
    assert not [one for one in named if not any(path.endswith(one[1]) for path in there)]


def _leads(page: Path, file: str, anchor: str = "") -> bool:
    other = page.parent / file if file else page
    return other.exists() and (not anchor or anchor in _anchors(other))


def _anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _words(text: str) -> set[str]:
    return set(text.split())


def _options(text: str) -> set[str]:
    return {word.strip(",.`") for word in text.split() if word.startswith("--")} & _words(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_have_options_that_there_are(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    said = re.sub(r"\\\n", " ", page.read_text(encoding="utf-8"))
    for line, name, rest in re.findall(r"(phoneready ((?:devices )?[a-z-]+)([^\n`|&;#]*))", said):
        if name not in COMMANDS:
            continue
        command = functools.reduce(lambda found, word: found.get_command(None, word), name.split(), group)
        options = {option for one in command.params for option in one.opts}
        keys = getattr(command.callback, "keys", {})
        words = re.split(r"[\s\[\]=]+", rest)
        assert {word for word in words if re.fullmatch("--[a-z-]+", word)} <= options | {
            "--help",
            "--help-all",
        }, line
        if name != "release":  # whose keys are those of release.toml
            assert set(re.findall(r"--set (\w+)=", rest)) <= keys.keys(), line
