"""What stages need at least is no more than they take, and is refused before anything is done if it cannot fit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from cfsp.errors import InputError
from cfsp.models.architectures import state_size
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.offload import VARIABLE
from cfsp.models.source import LoadedModel, ModelSource
from cfsp.progress import Progress
from cfsp.pruning.settings import PruneSettings
from cfsp.recovery.settings import Training
from exporters.families import FAMILIES, FileSettings
from exporters.family import ExportOptions
from exporters.gguf.export import export_gguf
from phoneready import room
from phoneready.main import main
from phoneready.releasing import check_stage_room, release_stages
from phoneready.room import (
    Extent,
    Needs,
    check_room,
    drawing_needs,
    exporting_needs,
    judging_needs,
    pruning_needs,
    read_extent,
    recovering_needs,
    require_room,
)
from phoneready.settings.schema import ReleaseConfig

TinyPath = Callable[..., Path]
SmallDisk = Callable[[str], Path]
BLOCK = ((64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128))
SMALL = Extent((BLOCK,) * 4, 384, 64)
LARGE = SMALL._replace(blocks=(BLOCK,) * 8)
EXPORTING = FileSettings(to=("Q4_0", "int4"))
NEEDS: dict[str, Callable[[list[Extent]], Needs]] = {
    "draw": drawing_needs,
    "prune": lambda extents: pruning_needs(extents, PruneSettings(), 8, 64),
    "quantize": lambda extents: exporting_needs(extents, EXPORTING, 8, 64),
    "eval": lambda extents: judging_needs(extents, 64, (False,)),
    "recover": lambda extents: recovering_needs(extents, Training(method="full")),
}


def test_a_larger_model_needs_more() -> None:
    for stage, needs in NEEDS.items():
        small, large = (needs([extent]) for extent in (SMALL, LARGE))
        assert large.memory > small.memory > 0
        assert large.disk > small.disk or stage == "eval"


def test_every_format_is_no_larger_than_floats() -> None:
    for family in FAMILIES.values():
        for name in family.formats:
            made = FileSettings(to=(name,))
            assert 0 <= exporting_needs([SMALL], made, None, 0).disk <= 8.1 * SMALL.least_weights


def test_every_stage_of_a_release_that_reads_a_model_is_checked(
    tiny_folder: TinyPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ReleaseConfig.model_validate(
        {"model": {"reference": "smollm2-135m"}, "recover": {}, "evaluate": {"files": ["Q4_0"]}}
    )
    checked: list[str] = []
    monkeypatch.setattr("phoneready.releasing.check_room", lambda what, *_, **__: checked.append(what))
    for stage in release_stages(config, tmp_path):
        check_stage_room(config, tmp_path, stage.name)
    assert checked == ["prune", "prune", "recover", "eval", "quantize", "quantize", "eval"]


@pytest.mark.parametrize(
    "command", [["prune"], ["quantize", "--to", "Q4_0", "--text", "none"], ["search", "--max-size", "1MB"]]
)
def test_a_disk_that_cannot_hold_the_output_is_refused_before_the_model_is_read(
    command: list[str],
    small_disk: SmallDisk,
    tiny_folder: TinyPath,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk, model = small_disk("200k"), str(tiny_folder())
    for place in ("phoneready.exporting", "cfsp.models.reference", "phoneready.release.steps"):
        monkeypatch.setattr(f"{place}.load_model", None)
    capsys.readouterr()
    assert main([command[0], model, "-o", str(disk / "out"), *command[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: no space left to write {disk / 'out'}: {command[0]} takes ")
    assert error.endswith("are free; allowed: another place (-o)\n")
    assert error.count("\n") == 1
    assert not list(disk.iterdir())


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[Needs]:
    """What commands ask room for, which is asked for all the same."""
    seen: list[Needs] = []
    require_room = room.require_room

    def watched(needs: Needs, *others: Any) -> None:
        seen.append(needs)
        require_room(needs, *others)

    monkeypatch.setattr(room, "require_room", watched)
    return seen


@pytest.mark.parametrize(
    "options",
    ["--prune-ratio 0.6", "--set align=8 --prune-ratio 0.35", "--blocks 2", "--vocabulary 300"],
)
def test_a_pruned_checkpoint_takes_no_less_than_what_is_asked_for(
    options: str, asked_for: list[Needs], tiny_folder: TinyPath, tmp_path: Path
) -> None:
    text = ["--calibration", "builtin:python-docs", "--set", "nsamples=2", "--set", "seqlen=32"]
    model = str(tiny_folder(intermediate_size=512))
    assert main(["prune", model, "-o", str(tmp_path / "out"), *text, *options.split()]) == 0
    (needs,) = asked_for
    written = folder_bytes(tmp_path / "out")
    assert needs.disk <= written
    others = "--blocks", "--attentions", "--kv-groups", "--vocabulary"
    assert bool(needs.disk) != options.startswith(others)


def test_on_a_gpu_no_memory_of_the_host_is_asked_for(
    tiny_folder: TinyPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cfsp.memory.free_memory", lambda: 0)
    model = [str(tiny_folder())]
    with pytest.raises(InputError, match="--method lora"):
        check_room("recover", model, NEEDS["recover"], tmp_path / "out")
    check_room("recover", model, NEEDS["recover"], tmp_path / "out", device=torch.device("meta"))


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "never")


@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("gemma3_text", False)])
def test_the_heads_of_files_say_how_large_a_model_is(
    model_type: str,
    tied: bool,
    tiny_model: Callable[..., tuple[torch.nn.Module, object]],
    tiny_folder: TinyPath,
    tiny_gguf: TinyPath,
) -> None:
    model, _ = tiny_model(model_type, tied=tied)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    for extent in (read_extent(make(model_type, tied=tied)) for make in (tiny_folder, tiny_gguf)):
        assert extent.least_weights == matrices - (0 if tied else 384 * 64)
        assert extent.widths == (128,) * 4
        assert (extent.vocab_size, extent.hidden_size) == (384, 64)


def test_a_further_table_of_tokens_counts(
    tiny_model: Callable[..., tuple[torch.nn.Module, object]], tiny_folder: TinyPath
) -> None:
    """In published models of these families it is nearly as large as all the rest."""
    model, _ = tiny_model("gemma4_text")
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    extent = read_extent(tiny_folder("gemma4_text"))
    assert extent.least_weights == matrices
    of_token = state_size(model.config)
    assert of_token >= 64 + 4 * model.config.hidden_size_per_layer_input
    assert extent.states_bytes(3) == 4 * 3 * of_token


def test_a_checkpoint_is_made_in_the_bits_of_its_model(
    tiny_loaded: Callable[..., LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_loaded()
    halves = LoadedModel(loaded.model, loaded.tokenizer, ModelSource("t", "folder", "t"), torch.bfloat16)
    save_checkpoint(halves, tmp_path / "model")
    assert read_extent(tmp_path / "model").stored_bytes == 2
    assert read_extent(tmp_path / "model").least_resident_bytes > 0
    monkeypatch.setenv(VARIABLE, "always")
    in_files = read_extent(tmp_path / "model")
    assert in_files.by_blocks
    assert in_files.least_resident_bytes == 0


def test_what_does_not_fit_a_disk_is_refused_with_what_is_free(
    small_disk: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk("1M")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    require_room(Needs(disk=2**19), disk / "new" / "out", "prune")
    with pytest.raises(InputError, match=r"prune takes 2.0 MiB at least, and 1.0 MiB are free.*\(-o\)"):
        require_room(Needs(disk=2**21), disk / "new" / "out", "prune")
    monkeypatch.setenv("TMPDIR", str(disk))
    with pytest.raises(InputError, match=r"1.4 MiB.*\(TMPDIR\)"):
        require_room(Needs(scratch=1400 * 2**10), disk / "out", "prune")
    require_room(Needs(disk=700 * 2**10, scratch=700 * 2**10), disk / "out", "prune")
    with pytest.raises(InputError, match=r"quantize takes 1024.0 TiB of memory at least"):
        require_room(Needs(memory=2**50), None, "quantize")
    assert not list(disk.iterdir())


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
    text = ["--calibration", "builtin:python-docs", "--set", "nsamples=2", "--set", "seqlen=32"]

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
