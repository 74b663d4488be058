"""The native runner, built once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cfsp.errors import InputError
from runtime_bench.native.build import build_runner
from runtime_bench.native.source import fetch_source
from runtime_bench.native.toolchain import find_toolchain


@pytest.fixture(scope="session")
def runner_for() -> Callable[[str], Path]:
    """Factory `runner_for(target)` of a runner that is kept in the user's cache; takes minutes where it is not there.

    Skips where the compiler is not installed or the source cannot be fetched.
    """

    def build(target: str) -> Path:
        try:
            find_toolchain(target)
            fetch_source()
        except InputError as error:
            pytest.skip(f"the runner cannot be built here: {error}")
        command = [sys.executable, "-m", "phoneready", "devices", "build-runner", "--target", target]
        subprocess.run(["nice", *command], check=True)
        return build_runner(target)

    return build
