"""The script that measures on another machine, in every shell that is installed here."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from runtime_bench.conditions.looks import conditions_of
from runtime_bench.conditions.script import READING
from runtime_bench.targets.remote_scripts import LOOKS_FOLLOW, RUN

SHELLS = [name for name in ("sh", "dash", "bash", "busybox", "mksh") if shutil.which(name)]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="POSIX shells")


def start(
    shell: str, folder: Path, *program: str, meters: str = "", under: Sequence[str] = ()
) -> subprocess.Popen[str]:
    words = ["busybox", "sh"] if shell == "busybox" else [shell]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [*under, *words, "-c", RUN, "phoneready", str(folder), meters, *program], text=True, **pipes
    )  # type: ignore[call-overload,no-any-return]


def words_of(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):  # it may end at any time
        return process.cmdline()
    return []


@pytest.mark.parametrize("shell", SHELLS)
def test_the_programs_output_and_status_and_then_the_looks(shell: str, tmp_path: Path) -> None:
    folder = tmp_path / "it's a $(folder)"
    folder.mkdir()
    with start(shell, folder, "sh", "-c", 'cat; sleep 1; printf "{}"; exit 7') as process:
        assert process.stdin is not None
        process.stdin.write('{"a": "b\\\\n"}\n')
        process.stdin.flush()
        assert process.stdout is not None
        output = process.stdout.read()
        assert process.wait() == 7
    answer, _, looks = output.partition(f"\n{LOOKS_FOLLOW}\n")
    assert answer == '{"a": "b\\\\n"}\n{}'
    assert len(conditions_of(looks).at_s) >= 2
    assert READING not in looks
    assert not list(folder.iterdir())


@pytest.mark.parametrize("shell", SHELLS)
def test_meters_are_read_beside_the_program(shell: str, tmp_path: Path) -> None:
    gauge = tmp_path / "sys" / "class" / "power_supply" / "battery" / "power_now"
    gauge.parent.mkdir(parents=True)
    gauge.write_text("50000000\n")
    script = RUN.replace("\nbase=  #", f"\nbase={tmp_path}  #", 1)
    words = ["busybox", "sh"] if shell == "busybox" else [shell]
    command = [*words, "-c", script, "phoneready", str(tmp_path), "metered", "sleep", "1"]
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write("{}\n")
        process.stdin.flush()
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    readings = [line.split() for line in lines if line.startswith(READING)]
    assert len(readings) > 3
    assert {reading[-1] for reading in readings} == {"50000000"}


@pytest.mark.parametrize("shell", SHELLS)
def test_what_ends_before_it_is_asked_has_the_only_word(shell: str, tmp_path: Path) -> None:
    """What it would be asked is more than a pipe holds, so that somebody must still be writing when it ends."""
    with start(shell, tmp_path, "sh", "-c", "echo cannot link executable >&2; exit 1") as process:
        assert process.stdin is not None
        process.stdin.write("x" * 300_000 + "\n")
        process.stdin.flush()
        assert process.stderr is not None
        assert process.stderr.read() == "cannot link executable\n"
        assert process.wait() == 1


@pytest.mark.parametrize("shell", SHELLS)
def test_nothing_is_left_when_nobody_listens_any_more(shell: str, tmp_path: Path) -> None:
    with start(shell, tmp_path, "sleep", "600") as process:
        assert process.stdin is not None
        process.stdin.write("{}\n")
        process.stdin.flush()
        family = psutil.Process(process.pid)
        deadline = time.monotonic() + 60
        while not any("600" in words_of(child) for child in family.children(recursive=True)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        children = family.children(recursive=True)
        for pipe in (process.stdout, process.stderr, process.stdin):
            assert pipe is not None
            pipe.close()
        process.wait(60)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shell", SHELLS)
def test_nothing_waits_for_a_client_after_the_program_where_no_shell_hears_term(
    shell: str, tmp_path: Path
) -> None:
    """mksh loses a TERM now and then; one that is ignored is lost in every shell, every time."""
    deaf = ("sh", "-c", "trap '' TERM; exec \"$@\"", "sh")
    with start(shell, tmp_path, "cat", under=deaf) as process:
        assert process.stdin is not None
        process.stdin.write("{}\n")
        process.stdin.flush()
        assert process.stdout is not None
        assert process.stdout.read().startswith(f"{{}}\n\n{LOOKS_FOLLOW}\n")
        assert process.wait() == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("meters", ["", "1"])
def test_where_nothing_may_be_written_there_are_no_looks_and_the_last_word_is_the_programs(
    meters: str, shell: str, tmp_path: Path
) -> None:
    program = ("sh", "-c", "cat; echo cannot link executable >&2")
    with start(shell, tmp_path / "nowhere", *program, meters=meters) as process:
        assert process.stdin is not None
        process.stdin.write("{}\n")
        process.stdin.flush()
        assert process.stdout is not None
        assert process.stderr is not None
        output, said = process.stdout.read(), process.stderr.read()
    assert output == f"{{}}\n\n{LOOKS_FOLLOW}\n"
    assert said.splitlines()[-1] == "cannot link executable"
