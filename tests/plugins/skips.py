"""Counts what a session skips against tests/expected_skips.toml, and fails it where more is skipped.

Where CI or PHONEREADY_COUNT_SKIPS is set (`make test` sets it), and PHONEREADY_ALLOW_SKIPS is not.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

EXPECTED = Path(__file__).parents[1] / "expected_skips.toml"
COUNT, ALLOW = ("CI", "PHONEREADY_COUNT_SKIPS"), "PHONEREADY_ALLOW_SKIPS"
_AT_COLLECTION = "skipped_at_collection"


def pytest_configure(config: pytest.Config) -> None:
    if any(os.environ.get(name) for name in COUNT) and not os.environ.get(ALLOW):
        config.pluginmanager.register(SkipCounter())


def unexpected_skips(reasons: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each reason that no row has, or that more tests give than its row allows."""
    rows, found = list(rows), []
    used = Counter[str]()
    for reason, count in Counter(reasons).items():
        row = next((row for row in rows if re.fullmatch(row["reason"], reason, re.DOTALL)), {})
        pattern, most = row.get("reason", reason), row.get("most", 0)
        used[pattern] += count
        if used[pattern] > most:
            found.append(f"{used[pattern]} skipped where {most} may be: {reason}")
    return found


class SkipCounter:
    """Gathers the reasons of skips, also from the processes of pytest-xdist."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.at_collection: list[str] = []
        self.lines: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reasons += _reasons(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.at_collection += _reasons(report)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        # Every process collects all tests, and pytest-xdist tells nothing of what that skipped.
        self.at_collection = getattr(node, "workeroutput", {}).get(_AT_COLLECTION, self.at_collection)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput[_AT_COLLECTION] = self.at_collection
            return
        rows = tomllib.loads(EXPECTED.read_text(encoding="utf-8"))["skip"]
        self.lines = unexpected_skips([*self.reasons, *self.at_collection], rows)
        if self.lines and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.lines:
            terminalreporter.section("skipped, and not expected to be", red=True)
            for line in self.lines:
                terminalreporter.line(line)
            terminalreporter.line(
                f"tests/{EXPECTED.name} lists what may be skipped. Install what is missing (`make javascript debian`, "
                f"as root), or let this pass with {ALLOW}=1."
            )


def _reasons(report: pytest.TestReport | pytest.CollectReport) -> list[str]:
    # An expected failure is reported as skipped, too, but has no place.
    if not report.skipped or not isinstance(report.longrepr, tuple | list):
        return []
    return [str(report.longrepr[2]).removeprefix("Skipped: ")]
