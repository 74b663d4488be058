"""Commands that read a model block by block: killed, or with its folder changed under them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.source import LoadedModel
from cfsp.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
TinyPath = Callable[..., Path]
TEXT = ["--calibration", "builtin:python-docs", "--set", "nsamples=2", "--set", "seqlen=32"]
COMMANDS = [["prune", *TEXT], ["quantize", "--to", "Q4_0", *TEXT], ["quantize", "--to", "int4", *TEXT]]


@pytest.mark.everything
@pytest.mark.parametrize("name", ["prune", "gguf", "onnx"])
def test_killed_while_a_model_is_read_it_makes_the_same_bytes(
    name: str, script: Callable[[str], ModuleType], sure_folder: TinyPath, tmp_path: Path
) -> None:
    experiment = script("benchmarks/kill_streamed")
    outcome = experiment.kill_and_repeat(name, sure_folder(), tmp_path, kills=2, each=2)
    assert outcome.problems == []
    assert (outcome.kills, outcome.finished) == (2, 1)


@pytest.mark.parametrize(
    ("command", "goes"), [(COMMANDS[0], True), (COMMANDS[1], False), (COMMANDS[2], True)]
)
def test_a_folder_that_changes_under_a_command_ends_it_in_a_line(
    command: list[str],
    goes: bool,
    tiny_folder: TinyPath,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    folder = tiny_folder()
    file = folder / "model.safetensors"
    content = file.read_bytes()

    @contextmanager
    def changing() -> Iterator[Progress]:
        def change(description: str, done: int, total: int) -> None:
            if description.startswith(("calibrating", "parity: checkpoint")) and file.exists():
                file.unlink()
                if not goes:
                    file.write_bytes(content)

        yield change

    monkeypatch.setenv("PHONEREADY_STREAM", "always")
    monkeypatch.setattr(f"phoneready.commands.{command[0]}.show_progress", changing)
    said = refused(command[0], folder, "-o", tmp_path / "made" / "out", *command[1:])
    assert said == f"error: {file} was changed while it was read\n"
    assert not list(tmp_path.iterdir())


def test_a_missing_shard_is_told_before_anything_is_made(
    tiny_loaded: Callable[..., LoadedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    monkeypatch.setattr("cfsp.models.weights.SHARD_BYTES", 2**18)
    save_checkpoint(tiny_loaded(), tmp_path / "model")
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    monkeypatch.setenv("PHONEREADY_STREAM", "always")
    for command in COMMANDS:
        said = refused(command[0], tmp_path / "model", "-o", tmp_path / "made" / "out", *command[1:])
        assert said.endswith(f"names weight files that are missing: {shards[-1].name}\n")
        assert not (tmp_path / "made").exists()
