"""A session that counts its skips fails when more is skipped than expected."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parent / "plugins"
TESTS = """
import pytest

def test_runs():
    pass

@pytest.mark.parametrize("number", range(2))
def test_skipped(number):
    pytest.skip({reason!r})
"""
MODULE = "import pytest\npytest.importorskip('no_such_package', reason='no_such_package is not installed')\n"
GRADLE = "no Gradle here"


def run(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    ours = ("CI", "PHONEREADY_COUNT_SKIPS", "PHONEREADY_ALLOW_SKIPS", "PYTEST_ADDOPTS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "skips",
        "--rootdir",
        str(folder),
        *options,
        str(folder),
    ]
    environment |= variables | {"PYTHONPATH": str(PLUGINS)}
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=folder, check=False)


@pytest.mark.parametrize(
    ("reason", "variables", "status"),
    [
        (GRADLE, {"CI": "1"}, 1),  # two of them, and one is expected
        ("no npm here", {"PHONEREADY_COUNT_SKIPS": "1"}, 1),
        ("no npm here", {"CI": "1", "PHONEREADY_ALLOW_SKIPS": "1"}, 0),
    ],
)
def test_more_skips_than_expected_fail_a_session_that_counts(
    tmp_path: Path, reason: str, variables: dict[str, str], status: int
) -> None:
    (tmp_path / "test_it.py").write_text(TESTS.format(reason=reason), encoding="utf-8")
    result = run(tmp_path, **variables)
    assert result.returncode == status, result.stdout
    assert ("skipped, and not expected" in result.stdout) == bool(status)
    assert (f"2 skipped where {int(reason == GRADLE)} may be: {reason}" in result.stdout) == bool(status)
    assert ("PHONEREADY_ALLOW_SKIPS=1" in result.stdout) == bool(status)


def test_a_whole_file_that_is_skipped_counts(tmp_path: Path) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (tmp_path / "test_it.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "test_other.py").write_text("def test_runs():\n    pass\n", encoding="utf-8")
    result = run(tmp_path, "-n", "2", CI="1")
    assert result.returncode == 1, result.stdout
    assert "1 skipped where 0 may be: no_such_package is not installed" in result.stdout
