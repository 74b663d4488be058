"""How threads of ours wait for each other, and those of what is measured."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cfsp.child_process import child_environment, measured_environment, wait_passively

WAITING, OURS = "OMP_WAIT_POLICY", "PHONEREADY_OMP_WAIT_POLICY"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (WAITING, OURS):
        monkeypatch.setenv(name, "")  # what is set in a test goes with it
        monkeypatch.delenv(name)


def test_ours_sleep_and_those_that_are_measured_do_as_they_like() -> None:
    wait_passively()
    assert child_environment()[WAITING] == "passive"
    assert not {WAITING, OURS} & set(measured_environment())


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP says what it does")
def test_the_command_line_says_so_before_torch_is_loaded() -> None:
    command = [sys.executable, "-m", "phoneready", "doctor"]
    said = os.environ | {"OMP_DISPLAY_ENV": "true"}
    result = subprocess.run(command, env=said, capture_output=True, text=True, check=False)
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in result.stderr
