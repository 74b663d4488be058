"""Stages in processes beside each other: the same files, errors in one line, and nobody left behind."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cfsp.files import sha256_file

TinyPath = Callable[..., Path]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def config(sure_folder: TinyPath, small_release: Callable[..., Path]) -> Callable[..., Path]:
    """`config(prune, quant, onnx)` writes a configuration; with `onnx` exports take some seconds."""
    model = sure_folder(intermediate_size=256)

    def write(prune: str = "prune_ratio = 0.25", quant: str = "Q8_0", onnx: str = "") -> Path:
        exports = f'quants = ["{quant}"]\nonnx = [{onnx}]'
        few = ("n_gen = [2]\nttft = [4]", "n_gen = []\nttft = []")
        return small_release(model, ("prune_ratio = 0.25", prune), ('quants = ["Q8_0"]', exports), few)

    return write


def workers(parent: int) -> list[psutil.Process]:
    """The processes of stages, that of the dense model's export first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = [
            one for one in psutil.Process(parent).children() if "--multiprocessing-fork" in one.cmdline()
        ]
        return sorted(children, key=lambda one: one.pid)
    return []


def wait_for(found: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def test_two_at_once_leave_the_files_of_one_after_the_other(
    config: Callable[..., Path], start_release: Start, tmp_path: Path
) -> None:
    manifests, errors = {}, {}
    for threads in (1, 2):
        process = start_release(config(), tmp_path / str(threads), threads=threads)
        errors[threads] = process.communicate(timeout=800)[1]
        assert process.returncode == 0, errors[threads]
        text = (tmp_path / str(threads) / "manifest.json").read_text(encoding="utf-8")
        manifests[threads] = json.loads(text)
    for released in manifests[1]["files"]:
        assert sha256_file(tmp_path / "2" / released["file"]) == released["sha256"]
    assert manifests[1]["stages"] == manifests[2]["stages"]
    lines = errors[2].splitlines()
    states = [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith(" ")]
    running = [name for name, state in states if state == "running"]
    assert states.index(("export-pruned", "running")) < min(
        number
        for number, (name, state) in enumerate(states)
        if name == "export-dense" and "finished" in state
    )
    told = [line.split(";")[0].strip() for line in lines if line.startswith(" ")]
    assert told == [f"{n} of {len(running)}" for n in range(1, len(running) + 1)]
    # What a stage had goes into the command that repeats it.
    for threads, had in ((1, [1, 1, 1]), (2, [2, 2, 1])):
        commands = map(shlex.split, manifests[threads]["commands"])
        assert [command[-2:] for command in commands] == [["--threads", str(each)] for each in had]


@pytest.mark.everything
def test_an_error_of_one_ends_the_others_and_the_run_in_one_line(
    config: Callable[..., Path], start_release: Start, tmp_path: Path
) -> None:
    # What the pruned model must fit into, the dense one need not.
    little = config("prune_ratio = 0\nblocks = 1", "mixed:20kB", onnx='"int8", "int8-dynamic"')
    process = start_release(little, tmp_path / "out", threads=2)
    other, failing = wait_for(lambda: len(found := workers(process.pid)) == 2 and found)
    wait_for(lambda: list((tmp_path / "out" / "stages").glob(".export-dense*")))
    other.suspend()  # held in the middle of its work, which could be done first
    failing.wait(timeout=400)
    other.resume()
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 2
    assert output == ""
    (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert "no types are small enough" in line
    assert "Traceback" not in errors
    assert not list((tmp_path / "out").glob("*.gguf"))
    assert not list((tmp_path / "out").rglob(".*.tmp-*"))
    stages = [path.name for path in (tmp_path / "out" / "stages").iterdir()]
    assert set(stages) == {"dense", "prune", "evaluate"}, (
        "the other export went on, or one left what it had half-written"
    )


@pytest.mark.everything
@pytest.mark.parametrize("ended", ["SIGKILL", "SIGTERM", "a stage"])
def test_nobody_is_left_when_one_is_ended(
    config: Callable[..., Path], start_release: Start, tmp_path: Path, ended: str
) -> None:
    process = start_release(config(onnx='"int8", "int8-dynamic"'), tmp_path / "out", threads=2)
    stages = tmp_path / "out" / "stages"
    wait_for(lambda: stages.is_dir() and list(stages.glob(".export-dense*")))
    found = workers(process.pid)
    if ended == "a stage":
        found[0].kill()
    else:
        process.send_signal(signal.Signals[ended])
    _, errors = process.communicate(timeout=120)
    statuses = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 130, "a stage": 2}
    assert process.returncode == statuses[ended]
    _, alive = psutil.wait_procs(found, timeout=60)
    assert not alive
    assert not list(stages.glob("export-*")), "they went on"
    last = {"SIGTERM": "error: interrupted", "a stage": "--threads 1 runs one stage at a time", "SIGKILL": ""}
    assert last[ended] in (errors.splitlines() or [""])[-1]
