"""Other machines on loopback: fixtures of a real sshd and real adbds, the runner, and what tests look at there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from cfsp.errors import InputError
from runtime_bench.native.build import build_runner, fetch_source, find_toolchain
from runtime_bench.targets.remote import Remote
from runtime_bench.targets.remote_shell import Adb, Ssh

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "-o $(touch pwned) `touch pwned`; 'q' \"d\" \\ \n &"


def _daemons() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loopback_daemons", ROOT / "tools" / "loopback_daemons.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Device:
    """A machine behind one of the transports, and how to make it vanish and come back."""

    target: Callable[..., Remote]
    vanish: Callable[[], None]
    come_back: Callable[[], None]
    address: str

    def on(self, **options: object) -> list[str]:
        """The option that names it."""
        return ["--on", ",".join([self.address, *(f"{key}={value}" for key, value in options.items())])]

    @property
    def name(self) -> str:
        """As records have it."""
        return self.address.partition(",")[0]


@pytest.fixture(scope="module")
def daemons() -> ModuleType:
    return _daemons()


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def board(daemons: ModuleType, stack: ExitStack) -> Any:
    """The sshd; what it runs finds the Python of these tests."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    try:
        return stack.enter_context(daemons.ssh_server(path))
    except daemons.NotPossible as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def phones(daemons: ModuleType, stack: ExitStack) -> Any:
    """The adb server, without devices."""
    try:
        return stack.enter_context(daemons.adb_devices())
    except daemons.NotPossible as error:
        pytest.skip(str(error))


@pytest.fixture
def adb_environment(phones: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in phones.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["ssh", pytest.param("adb", marks=pytest.mark.everything)])
def device(request: pytest.FixtureRequest, far: Path, runner: Path) -> Iterator[Device]:
    if request.param == "ssh":
        board = request.getfixturevalue("board")

        def target(**changes: Any) -> Remote:
            return Remote(Ssh("board", board.config), **({"runner": runner, "folder": str(far)} | changes))

        yield Device(target, board.kill, board.start, f"ssh:board,config={board.config}")
        board.kill()
        board.start()
        return
    phones = request.getfixturevalue("phones")
    request.getfixturevalue("adb_environment")
    serial = phones.start()

    def target(**changes: Any) -> Remote:
        return Remote(Adb(serial), **({"runner": runner, "folder": str(far)} | changes))

    yield Device(target, lambda: phones.kill(serial), lambda: phones.start(), f"adb:{serial}")
    phones.kill_all()


@pytest.fixture
def far(tmp_path: Path) -> Path:
    """The folder there, which does not exist yet and has a name that a shell must not see bare."""
    return tmp_path / "far away" / HOSTILE.replace("\n", "")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    return path


@pytest.fixture
def runner(tmp_path: Path) -> Path:
    """A program that speaks the runner's protocol: the worker that measures here."""
    command = f"PYTHONPATH='{ROOT}' exec '{sys.executable}' -P -m runtime_bench.worker"
    return script(tmp_path / "runner", command)


@pytest.fixture
def sleeper(tmp_path: Path) -> Path:
    """A runner that never ends by itself; its last argument makes it known."""
    return script(
        tmp_path / "sleeper", f"exec {sys.executable} -c 'import time; time.sleep(600)' {tmp_path}/awake"
    )


def running(mark: object) -> list[psutil.Process]:
    """Processes with a mark in their arguments, but for this one and those above it."""
    above = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if str(mark) in words and process.pid not in above:
            found.append(process)
    return found


def until(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def files_in(folder: Path) -> dict[str, Path]:
    return {file.name: file for file in folder.rglob("*") if file.is_file()}


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
