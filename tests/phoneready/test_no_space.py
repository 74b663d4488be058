"""A full disk is a one-line error, whichever library was writing."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import InputError
from cfsp.models.checkpoint import save_checkpoint
from cfsp.progress import Progress
from exporters.family import ExportOptions
from exporters.gguf.export import export_gguf

TinyPath = Callable[..., Path]
SmallDisk = Callable[[str], Path]


def test_a_checkpoint_that_does_not_fit(small_disk: SmallDisk, tiny_loaded: Callable[..., Any]) -> None:
    disk = small_disk("200k")
    with pytest.raises(InputError, match="no space left to write "):
        save_checkpoint(tiny_loaded(), disk / "out")
    assert not list(disk.iterdir())


def test_an_export_that_does_not_fit(small_disk: SmallDisk, tiny_folder: TinyPath) -> None:
    disk = small_disk("200k")
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    with pytest.raises(InputError, match="no space left to write "):
        export_gguf(tiny_folder(), disk / "out", ["Q4_0"], ExportOptions(n_threads=1))
    assert not list(disk.iterdir())


def test_a_disk_that_others_fill_while_a_command_runs(
    small_disk: SmallDisk,
    tiny_folder: TinyPath,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    """It was large enough when the command began, and its model is read block by block."""
    disk, model = small_disk("4M"), str(tiny_folder())
    monkeypatch.setenv("PHONEREADY_STREAM", "always")
    monkeypatch.setenv("TMPDIR", str(disk))
    text = ["--calibration", "builtin:python-docs", "--nsamples", "2", "--seqlen", "32"]

    @contextmanager
    def filling() -> Iterator[Progress]:
        yield lambda description, done, total: _fill(disk) if description == "calibrating" else None

    monkeypatch.setattr("phoneready.commands.prune.show_progress", filling)
    assert "error: no space left to write " in refused("prune", model, "-o", disk / "out", *text)
    gc.collect()
    assert [path.name for path in disk.iterdir()] == ["full"]


def _fill(disk: Path) -> None:
    with (disk / "full").open("ab", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(bytes(4096))
