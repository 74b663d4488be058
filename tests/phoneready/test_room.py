"""What stages need at least is no more than they take, and is refused before anything is done if it cannot fit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cfsp.errors import InputError
from cfsp.pruning.settings import PruneSettings
from cfsp.recovery.settings import Training
from exporters.families import FAMILIES, FileSettings, find_format
from phoneready import room
from phoneready.main import main
from phoneready.recipe import check_stage_room, release_stages
from phoneready.room import (
    Extent,
    Needs,
    check_room,
    drawing_needs,
    exporting_needs,
    judging_needs,
    pruning_needs,
    recovering_needs,
)
from phoneready.settings.schema import ReleaseConfig

TinyPath = Callable[..., Path]
SmallDisk = Callable[[str], Path]
BLOCK = ((64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128))
SMALL = Extent((BLOCK,) * 4, 384, 64)
LARGE = replace(SMALL, blocks=(BLOCK,) * 8)
EXPORTING = FileSettings(quants=("Q4_0",), onnx=("int4",))
NEEDS: dict[str, Callable[[list[Extent]], Needs]] = {
    "draw": lambda extents: drawing_needs(extents, 8, 64, moments=True),
    "prune": lambda extents: pruning_needs(extents, PruneSettings(), 8, 64),
    "export": lambda extents: exporting_needs(extents, EXPORTING, 8, 64),
    "eval": lambda extents: judging_needs(extents, 64, (False,)),
    "recover": lambda extents: recovering_needs(extents, Training(method="full")),
}


@pytest.mark.parametrize("stage", NEEDS)
def test_a_larger_model_needs_more(stage: str) -> None:
    small, large = (NEEDS[stage]([extent]) for extent in (SMALL, LARGE))
    assert large.memory > small.memory > 0
    assert large.disk > small.disk or stage == "eval"


def test_only_what_is_held_is_asked_for() -> None:
    light, heavy = (pruning_needs([SMALL], PruneSettings(prune_ratio=r), 8, 64) for r in (0.2, 0.5))
    assert heavy.disk < light.disk
    assert not judging_needs([SMALL], 64, (True,)).memory, "a file in its own runtime is mapped"
    assert not recovering_needs([SMALL], Training(method="lora")).memory
    assert recovering_needs([SMALL], Training(method="full")).memory == 12 * SMALL.least_weights


@pytest.mark.parametrize("name", [name for family in FAMILIES.values() for name in family.formats])
def test_every_format_is_no_larger_than_floats(name: str) -> None:
    family = next(family for family in FAMILIES.values() if name in family.formats)
    made = replace(FileSettings(quants=(), onnx=()), **{family.setting: (name,)})
    assert 0 <= exporting_needs([SMALL], made, None, 0).disk <= 8.1 * SMALL.least_weights


def test_a_disk_need_not_hold_what_is_not_there_at_once() -> None:
    """Floats that ONNX variants are proven by go before these are written; those of GGUF files stay."""
    floats = 4 * SMALL.least_weights
    gguf, onnx, both = (
        exporting_needs([SMALL], FileSettings(quants=quants, onnx=variants), 8, 64).disk
        for quants, variants in ((("Q4_0",), ()), ((), ("int4",)), (("Q4_0",), ("int4",)))
    )
    assert onnx == floats < gguf
    assert floats < both < 2 * floats


def test_every_stage_of_a_release_that_reads_a_model_is_checked(
    tiny_folder: TinyPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ReleaseConfig.model_validate(
        {"model": {"reference": "smollm2-135m"}, "recover": {}, "evaluate": {"files": ["Q4_0"]}}
    )
    checked: list[str] = []
    monkeypatch.setattr("phoneready.recipe.check_room", lambda what, *_, **__: checked.append(what))
    for stage in release_stages(config, tmp_path):
        check_stage_room(config, tmp_path, stage.name)
    assert checked == ["prune", "prune", "recover", "eval", "export", "export", "eval", "eval"]


@pytest.mark.parametrize(
    "command", [["prune"], ["export", "--gguf", "Q4_0"], ["search", "--max-size", "1MB"]]
)
def test_a_disk_that_cannot_hold_the_output_is_refused_before_the_model_is_read(
    command: list[str],
    small_disk: SmallDisk,
    tiny_folder: TinyPath,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk, model = small_disk("200k"), str(tiny_folder())
    for place in ("phoneready.exporting", "cfsp.models.reference", "phoneready.search.evaluate"):
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
    [
        "",
        "--prune-ratio 0.6",
        "--prune-ratio 0",
        "--align 8 --prune-ratio 0.35",
        "--blocks 2",
        "--vocabulary 300",
    ],
)
def test_a_pruned_checkpoint_takes_no_less_than_what_is_asked_for(
    options: str, asked_for: list[Needs], tiny_folder: TinyPath, tmp_path: Path
) -> None:
    text = ["--calibration", "builtin:python-docs", "--nsamples", "2", "--seqlen", "32"]
    model = str(tiny_folder(intermediate_size=512))
    assert main(["prune", model, "-o", str(tmp_path / "out"), *text, *options.split()]) == 0
    (needs,) = asked_for
    written = folder_bytes(tmp_path / "out")
    assert needs.disk <= written
    others = "--blocks", "--attentions", "--kv-groups", "--vocabulary"
    assert bool(needs.disk) != options.startswith(others)


_WATCHED: list[Callable[[], None]] = []
"""Called before anything is deleted or renamed; hooks of the interpreter stay, so there is one for all tests."""
_DELETES = ("os.remove", "os.rename", "os.rmdir", "shutil.rmtree")


def _before_deletion(event: str, _: object) -> None:
    if event in _DELETES:
        for watch in tuple(_WATCHED):
            watch()


@contextmanager
def most_bytes(folder: Path) -> Iterator[list[int]]:
    """Sizes of a folder whenever something is about to go, the largest of which is the most that was there."""
    sizes: list[int] = []
    if not getattr(most_bytes, "hooked", False):
        sys.addaudithook(_before_deletion)
        most_bytes.hooked = True  # type: ignore[attr-defined]

    def watch() -> None:
        sizes.append(folder_bytes(folder))

    _WATCHED.append(watch)
    try:
        yield sizes
    finally:
        _WATCHED.remove(watch)
        watch()


@pytest.mark.parametrize(
    ("family", "names"),
    [
        *(("gguf", (name,)) for name in ("f32", "f16", "Q4_K_M")),
        *(("onnx", (name,)) for name in ("fp32", "int4")),
        ("gguf", ("f16", "Q8_0", "Q4_0")),
        ("onnx", ("fp16", "int4")),
    ],
)
def test_exports_take_no_less_than_what_is_asked_for(
    family: str, names: tuple[str, ...], asked_for: list[Needs], sure_folder: TinyPath, tmp_path: Path
) -> None:
    """Of what is there at once: floats that files are made of, and files."""
    model = sure_folder(hidden_size=128, intermediate_size=256)
    command = ["export", str(model), "-o", str(tmp_path / "out"), f"--{family}", ",".join(names)]
    if any("calibration" in find_format(name).reads for name in names):
        command += ["--calibration", "none"]
    with most_bytes(tmp_path) as sizes:
        assert main([*command, "--threads", "1"]) == 0
    (needs,) = asked_for
    assert 0 < needs.disk <= max(sizes)


def test_on_a_gpu_no_memory_of_the_host_is_asked_for(
    tiny_folder: TinyPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cfsp.memory.free_memory", lambda: 0)
    model = [str(tiny_folder())]
    with pytest.raises(InputError, match="--method lora"):
        check_room("recover", model, NEEDS["recover"], tmp_path / "out")
    check_room("recover", model, NEEDS["recover"], tmp_path / "out", device=torch.device("meta"))
