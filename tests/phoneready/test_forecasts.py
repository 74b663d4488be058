"""What stages will take grows with what is asked for, is said before a long one, and refused where it cannot fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cfsp.forecast import Extent, Work
from cfsp.pruning.settings import PruneSettings
from cfsp.recovery.settings import Training
from exporters.families import FAMILIES, find_format
from phoneready.forecasts import said
from phoneready.forecasts.stages import (
    _FAMILIES,
    STAGES,
    Drawing,
    Exporting,
    Judging,
    Pruning,
    Surveying,
    Windows,
)
from phoneready.main import main
from phoneready.recipe import release_stages
from phoneready.release.foretold import _ROWS
from phoneready.settings.schema import ReleaseConfig

TinyPath = Callable[..., Path]
SmallDisk = Callable[[str], Path]
BLOCK = ((64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128))
SMALL = Extent((BLOCK,) * 4, 384, 64, tied=True)
LARGE = replace(SMALL, blocks=(BLOCK,) * 8)
TEXT = Windows(8, 64)
PRUNING, EXPORTING = Pruning(PruneSettings(), TEXT), Exporting(("Q4_0", "int4"), TEXT)
ASKED = {
    "draw": Drawing(TEXT, moments=True),
    "prune": PRUNING,
    "export": EXPORTING,
    "eval": Judging(TEXT, 4, 16, (False,)),
    "recover": Training(max_tokens=4096, seqlen=64),
    "frontier": Surveying(PRUNING, EXPORTING, TEXT, 2),
}


def operations(work: Work) -> float:
    return sum(work.products.values())


@pytest.mark.parametrize("stage", STAGES)
def test_a_larger_model_takes_more_of_everything(stage: str) -> None:
    small, large = (STAGES[stage]([extent], ASKED[stage]) for extent in (SMALL, LARGE))
    assert operations(large) > operations(small)
    assert large.elements > small.elements
    assert large.memory > small.memory
    assert large.disk > small.disk or stage == "eval"


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("prune", replace(PRUNING, text=Windows(16, 64))),
        ("prune", Pruning(PruneSettings(allocation="loss"), TEXT)),
        ("prune", Pruning(PruneSettings(reconstruct="block-by-block", score="obs_loss"), TEXT)),
        ("prune", Pruning(PruneSettings(blocks=1), TEXT)),
        ("export", replace(EXPORTING, names=("Q4_0", "Q8_0", "int4"))),
        ("export", replace(EXPORTING, text=Windows(16, 64))),
        ("export", replace(EXPORTING, tune_scales=True)),
        ("export", replace(EXPORTING, is_saved=True)),
        ("eval", Judging(TEXT, 4, 32, (False,))),
        ("recover", Training(max_tokens=8192, seqlen=64)),
        ("recover", Training(max_tokens=4096, seqlen=64, loss="distill")),
        ("frontier", replace(ASKED["frontier"], checkpoints=3)),
    ],
)
def test_what_is_asked_for_counts(stage: str, more: object) -> None:
    usual, work = (STAGES[stage]([SMALL], asked) for asked in (ASKED[stage], more))
    assert operations(work) + work.elements > operations(usual) + usual.elements


def test_less_is_left_of_a_pruned_model_on_the_disk() -> None:
    light, heavy = (
        STAGES["prune"]([SMALL], Pruning(PruneSettings(prune_ratio=ratio), TEXT)) for ratio in (0.2, 0.5)
    )
    assert heavy.disk < light.disk


@pytest.mark.parametrize("name", [name for family in FAMILIES.values() for name in family.formats])
def test_every_format_has_a_size_no_larger_than_floats(name: str) -> None:
    plain = Exporting((name,), is_proven=False)
    work = STAGES["export"]([SMALL], plain)
    assert work.least_disk <= work.disk <= 8.1 * SMALL.n_weights
    assert work.least_disk or not find_format(name).is_sized
    assert operations(STAGES["export"]([SMALL], replace(plain, is_proven=True))) > operations(work)


def test_every_family_has_a_row() -> None:
    assert set(_FAMILIES) == set(FAMILIES)


def test_a_disk_need_not_hold_what_is_not_there_at_once() -> None:
    """Floats that ONNX variants are proven by go before these are written; those of GGUF files stay."""
    floats = 4 * SMALL.least_weights
    gguf, onnx, both = (
        STAGES["export"]([SMALL], Exporting(names, TEXT)).least_disk
        for names in (("Q4_0",), ("int4",), ("Q4_0", "int4"))
    )
    assert onnx == floats < gguf
    assert floats < both < 2 * floats


def test_stages_of_a_release_are_those_that_there_are() -> None:
    config = ReleaseConfig.model_validate(
        {"model": {"reference": "smollm2-135m"}, "recover": {}, "evaluate": {"files": ["Q4_0"]}}
    )
    there = {stage.name for stage in release_stages(config, Path("nowhere"))}
    assert set(_ROWS) <= there
    assert {row.work for row in _ROWS.values()} <= set(STAGES)
    for row in _ROWS.values():
        extents = [SMALL] * max(1, len(row.models))
        assert operations(STAGES[row.work](extents, row.asked(config))) > 0


@pytest.mark.parametrize(
    "command",
    [
        ["prune", "-o", "OUT", "--calibration", "builtin:python-docs", "--nsamples", "2", "--seqlen", "32"],
        ["export", "-o", "OUT", "--gguf", "Q8_0", "--threads", "1"],
        ["eval", "--windows", "1", "--seqlen", "32", "--no-prompts"],
    ],
)
def test_a_long_stage_is_announced_in_a_line_and_a_short_one_is_not(
    command: list[str],
    tiny_folder: TinyPath,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = str(tiny_folder())
    for number, long in enumerate((float("inf"), 0.0)):
        monkeypatch.setattr(said, "LONG_S", long)
        line = [word if word != "OUT" else str(tmp_path / str(number)) for word in command]
        capsys.readouterr()
        assert main([line[0], model, *line[1:]]) == 0
        told = [line for line in capsys.readouterr().err.splitlines() if " of memory" in line]
        assert len(told) == number
        assert all(line.startswith("about ") for line in told)


@pytest.mark.parametrize("command", [["prune"], ["export", "--gguf", "Q4_0"]])
def test_a_disk_that_cannot_hold_the_output_is_refused_before_the_model_is_read(
    command: list[str],
    small_disk: SmallDisk,
    tiny_folder: TinyPath,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk, model = small_disk("200k"), str(tiny_folder())
    for place in ("phoneready.exporting", "cfsp.models.reference"):
        monkeypatch.setattr(f"{place}.load_model", None)
    capsys.readouterr()
    assert main([command[0], model, "-o", str(disk / "out"), *command[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: no space left to write {disk / 'out'}: {command[0]} takes ")
    assert error.endswith("are free; allowed: another place (-o)\n")
    assert error.count("\n") == 1
    assert not list(disk.iterdir())
