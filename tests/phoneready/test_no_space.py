"""A full disk is a one-line error, whichever library was writing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phoneready.main import main

TinyPath = Callable[..., Path]
SmallDisk = Callable[[str], Path]


def test_a_checkpoint_that_does_not_fit(
    small_disk: SmallDisk, tiny_folder: TinyPath, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk("200k")
    sizes = ["--calibration", "builtin:python-docs", "--nsamples", "2", "--seqlen", "32"]
    model = str(tiny_folder())
    capsys.readouterr()
    assert main(["prune", model, "-o", str(disk / "out"), *sizes]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: no space left to write ")
    assert captured.err.count("\n") == 1
    assert not list(disk.iterdir())


def test_an_export_that_does_not_fit(
    small_disk: SmallDisk, tiny_folder: TinyPath, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk("200k")
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    model = str(tiny_folder())
    capsys.readouterr()
    assert main(["export", model, "-o", str(disk / "out"), "--threads", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: no space left to write ")
    assert not list(disk.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_result_that_cannot_be_printed() -> None:
    root = Path(__file__).resolve().parents[2]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "phoneready", "doctor"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(root)},
            check=False,
        )
    assert result.returncode == 2
    assert "No space left" in result.stderr.splitlines()[0]
