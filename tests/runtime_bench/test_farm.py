"""Many devices at once: ten real daemons of which three fail, each in its way."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loopback import ROOT, running, script, until

from cfsp.errors import InputError
from phoneready.main import main
from runtime_bench.records.jsonl import read_jsonl
from runtime_bench.targets.table import every_target

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons from Debian")

SIZES = ["-p", "0", "-n", "0", "--set", "ttft=0", "-r", "1", "-t", "1", "--set", "check_text=false"]
FIRST_PORT = 5701
DYING, REFUSING, LEAVING = FIRST_PORT + 2, FIRST_PORT + 4, FIRST_PORT + 6


@pytest.fixture
def farm(phones: Any, adb_environment: None) -> Any:
    """Nine phones; adbd tells what it runs its port, so that one program can be another on each."""
    for port in range(FIRST_PORT, FIRST_PORT + 9):
        phones.start(port)
    yield phones
    phones.kill_all()


def name(port: int) -> str:
    return f"adb:127.0.0.1:{port}"


def test_ten_devices_of_which_three_fail(
    farm: Any,
    board: Any,
    tiny_gguf: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("runtime_bench.targets.remote._FIRST_PAUSE_S", 0.1)
    files = [tiny_gguf(), tiny_gguf(seed=1)]
    sleep = f"exec {sys.executable} -c 'import time; time.sleep(600)' {tmp_path}/awake"
    runner = script(
        tmp_path / "runner",
        f"""
        case $ADBD_PORT in
        {DYING}) {sleep} ;;
        {REFUSING}) echo cannot link executable >&2; exit 1 ;;
        {LEAVING}) mkdir {tmp_path}/left 2>/dev/null || {sleep} ;;
        esac
        PYTHONPATH='{ROOT}' exec '{sys.executable}' -P -m runtime_bench.worker""",
    )
    record, devices = tmp_path / "rows.jsonl", tmp_path / "devices.txt"
    options = f"runner={runner},folder={tmp_path / 'far'},retries=1"
    devices.write_text(
        f"# the farm\nadb:*,{options}\n\nssh:board,config={board.config},{options}  # a board beside it\n"
    )

    def vanish() -> None:
        """One dies in the middle of its first file, one is gone when its second one begins."""
        until(lambda: len(running(tmp_path / "awake")) >= 2, "the runs do not begin")
        for port in (DYING, LEAVING):
            farm.kill(f"127.0.0.1:{port}")

    thread = threading.Thread(target=vanish)
    thread.start()
    status = main(["bench", *map(str, files), *SIZES, "--on", f"@{devices}", "--record", str(record)])
    thread.join()
    captured = capsys.readouterr()

    assert status == 1
    *lines, last = captured.err.splitlines()
    failed = [name(port) for port in (DYING, REFUSING, LEAVING)]
    assert last == f"error: 5 of 20 rows could not be measured on {', '.join(failed)}"
    rows = read_jsonl(record)
    everyone = [*(name(port) for port in range(FIRST_PORT, FIRST_PORT + 9)), "ssh:board"]
    assert sorted((row.target, row.model_filename) for row in rows) == sorted(
        (target, str(file)) for target in everyone for file in files
    )
    by_target = {target: [row for row in rows if row.target == target] for target in everyone}
    for target in set(everyone) - set(failed):
        assert [row.failure for row in by_target[target]] == [None, None]
    dead, refusing, leaving = (by_target[target] for target in failed)
    assert all("the device went away" in str(row.failure) or "offline" in str(row.failure) for row in dead)
    assert [row.failure for row in refusing] == ["exit status 1: cannot link executable"] * 2
    assert [row.ok for row in leaving] == [True, False]
    # A line for each row as it came, and one table of all.
    assert len([line for line in lines if line.startswith(("adb:", "ssh:")) and " load: " in line]) == 20
    table = captured.out.partition("\n\n")[0].splitlines()
    assert [sum(line.startswith(f"| {target} ") for line in table) for target in everyone] == [2] * 10
    until(lambda: not running(tmp_path / "awake"), "a run goes on there")


def test_lines_of_records_come_one_by_one(
    farm: Any,
    tiny_gguf: Callable[..., Path],
    tmp_path: Path,
    runner: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = f"runner={runner},folder={tmp_path / 'far'}"
    where = [word for port in (FIRST_PORT, FIRST_PORT + 1) for word in ("--on", f"{name(port)},{options}")]
    assert main(["bench", str(tiny_gguf()), *SIZES, *where, "-o", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(row["target"] for row in rows) == [name(FIRST_PORT), name(FIRST_PORT + 1)]


@pytest.mark.usefixtures("adb_environment")
def test_names_that_stand_for_several(phones: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no device is attached"):
        every_target(["adb:*"])
    phones.start(FIRST_PORT)
    listed = tmp_path / "farm.txt"
    listed.write_text(f"ssh:a # one\n\n{name(FIRST_PORT)}\nssh:b\n")
    try:
        assert every_target(["adb:*", "local", f"@{listed}"]) == (name(FIRST_PORT), "local", "ssh:a", "ssh:b")
    finally:
        phones.kill_all()
    for text in ("", "# nothing\n", f"@{listed}\n"):
        listed.write_text(text)
        with pytest.raises(InputError, match="lists no targets"):
            every_target([f"@{listed}"])
    with pytest.raises(InputError):
        every_target([f"@{tmp_path}/nothing"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="adb is not installed"):
        every_target(["adb:*"])
