"""The error boundary: one line on stderr, the right status, nothing on stdout."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cfsp.errors import InputError, LimitError
from phoneready import main as entry

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "phoneready", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("bad", field="x"), 2),
        (LimitError("missed"), 1),
        (RuntimeError("odd"), 70),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_one_line_and_a_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(entry, "app", raising)
    monkeypatch.setattr(raising, "info", entry.typer.Typer(name="phoneready").info, raising=False)
    assert entry.main(["prune"]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert entry.main(["prune", "--debug"]) == status
    assert "Traceback" in capsys.readouterr().err


def test_version_and_doctor_json() -> None:
    assert command("--version").stdout.startswith("phoneready ")
    result = command("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == (0 if report["ok"] else 1)
    assert {"Python", "torch", "llama-cpp-python", "GPU", "memory"} <= {
        check["name"] for check in report["checks"]
    }


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupt_in_a_callback_from_c_is_not_lost() -> None:
    """ctypes drops what is raised there, and the signal that is ignored from then on could not end the process."""
    code = """
import ctypes, os, signal, sys, time
import phoneready.__main__ as entry, phoneready.main

def busy(arguments):
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    callback = kind(lambda a, b: os.kill(os.getpid(), signal.SIGTERM) or 0)
    ctypes.CDLL(None).qsort((ctypes.c_int * 2)(), 2, 4, callback)
    print("went on", flush=True)
    time.sleep(60)

phoneready.main.main = busy
entry.run()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=40, check=False
    )
    assert result.stdout == "went on\n"
    assert result.returncode == 130
    assert result.stderr == "error: interrupted\n"


def test_nothing_of_the_working_directory_is_imported(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name in ("json", "torch", "llama_cpp", "pip", "typer", "pathlib"):
        (tmp_path / f"{name}.py").write_text(f"open({str(canary)!r}, 'w').close()\n", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "phoneready", "doctor"]
    subprocess.run(line, capture_output=True, env=environment, cwd=tmp_path, check=False)
    assert not canary.exists()


SHELL = f"PYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} -m phoneready"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
@pytest.mark.parametrize(
    ("command", "statuses", "reason"),
    [
        ("devices list >&-", {2}, "standard output is closed"),
        ("devices list <&- >&- 2>&-", {2}, None),
        ("devices list >/dev/full", {2}, "No space left on device"),
        ("devices list 2>/dev/full", {0}, None),
        ("prune $(printf 'a\\377') -o x", {2}, "not UTF-8"),
        ("--version | true", {0, 141}, None),
    ],
)
def test_streams_that_cannot_be_written(
    command: str, statuses: set[int], reason: str | None, tmp_path: Path
) -> None:
    first, bar, rest = command.partition(" | ")
    script = f"({SHELL} {first}; echo $? >status)" + (f" | {rest}" if bar else "")
    script = script.replace("exec ", "")
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert int((tmp_path / "status").read_text()) in statuses
    assert result.stderr.count("\n") == (1 if reason else 0)
    assert (reason or "") in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupt_ends_in_one_line_from_the_first_import_on(tmp_path: Path) -> None:
    # A module that phoneready.main imports says when the interrupt comes.
    (tmp_path / "typer.py").write_text(
        "import time; print('up', flush=True); time.sleep(60)\n", encoding="utf-8"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    line = [sys.executable, "-m", "phoneready", "devices", "list"]
    with subprocess.Popen(line, stdout=-1, stderr=-1, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "error: interrupted\n"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_ended_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import signal, sys, time; from pathlib import Path; import phoneready.main as entry\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which tests may run, has it ignored\n"
        "from cfsp.files import atomic_directory; from phoneready.__main__ import run\n"
        "def main(arguments):\n"
        "    with atomic_directory(Path(arguments[0])) as folder:\n"
        "        (folder / 'half').write_text('x'); print('up', flush=True); time.sleep(60)\n"
        "entry.main = main\n"
        "run()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", code, str(tmp_path / "deep" / "out")]
    with subprocess.Popen(line, stdout=-1, stderr=-1, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "error: interrupted\n")
    assert not list(tmp_path.iterdir())
