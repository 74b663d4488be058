"""Forecasts: how much of a model there is, by the heads of its files; what work adds up to; what cannot fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cfsp.errors import InputError
from cfsp.forecast import Extent, Work, foresee, product_speed, read_extent, require_room
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.paging import VARIABLE
from cfsp.models.source import LoadedModel, ModelSource

TinyPath = Callable[..., Path]


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "never")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "lfm2"])
def test_the_heads_of_files_say_how_large_a_model_is(
    model_type: str,
    tied: bool,
    tiny_model: Callable[..., tuple[torch.nn.Module, object]],
    tiny_folder: TinyPath,
) -> None:
    model, _ = tiny_model(model_type, tied=tied)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    extent = read_extent(tiny_folder(model_type, tied=tied))
    assert extent.n_weights == matrices
    assert extent.tied == tied
    assert extent.widths == (128,) * 4
    assert (extent.vocab_size, extent.hidden_size) == (384, 64)


def test_a_gguf_file_is_as_large_as_its_folder(tiny_folder: TinyPath, tiny_gguf: TinyPath) -> None:
    of_file, of_folder = read_extent(tiny_gguf(tied=False)), read_extent(tiny_folder(tied=False))
    assert of_file.n_weights == of_folder.n_weights
    assert sorted(of_file.blocks[0]) == sorted(of_folder.blocks[0])


def test_a_checkpoint_is_made_in_the_bits_of_its_model(
    tiny_loaded: Callable[..., LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_loaded()
    halves = LoadedModel(loaded.model, loaded.tokenizer, ModelSource("t", "folder", "t"), torch.bfloat16)
    save_checkpoint(halves, tmp_path / "model")
    assert read_extent(tmp_path / "model").stored_bytes == 2
    whole = read_extent(tmp_path / "model").resident_bytes
    monkeypatch.setenv(VARIABLE, "always")
    in_files = read_extent(tmp_path / "model")
    assert in_files.by_blocks
    assert in_files.resident_bytes < whole / 3


def test_a_narrowed_model_has_less_in_its_ffn_alone(tiny_folder: TinyPath) -> None:
    extent = read_extent(tiny_folder())
    kept = extent.narrowed(0.25)
    assert kept.widths == (96,) * 4
    assert extent.n_weights - kept.n_weights == 4 * 3 * 64 * 32


def test_operations_follow_the_shapes(tiny_folder: TinyPath) -> None:
    extent = read_extent(tiny_folder())
    assert extent.pass_operations(200, 10) == 2 * extent.pass_operations(100, 10)
    assert extent.pass_operations(100, 50) > extent.pass_operations(100, 10)
    assert extent.pass_operations(1, 0) == 2 * extent.block_weights
    assert extent.head_operations(3) == 2 * 3 * 384 * 64


def test_work_of_stages_adds_up() -> None:
    first = Work({8: 1e9}, elements=2.0, memory=5, disk=3, least_disk=2, scratch=7)
    both = first.then(Work({8: 1e9, 1: 5.0}, seconds=1.0, memory=4, disk=1, scratch=9))
    assert both == Work(
        {8: 2e9, 1: 5.0}, elements=2.0, seconds=1.0, memory=5, disk=4, least_disk=2, scratch=9
    )
    assert first.times(3) == Work({8: 3e9}, elements=6.0, memory=5, disk=3, least_disk=2, scratch=7)


def test_little_work_is_within_any_time() -> None:
    assert Work({8: 1e6}, elements=1e4).is_within(1)
    assert not Work({8: 1e12}).is_within(1)
    assert not Work(elements=1e12).is_within(1)
    assert not Work(seconds=2).is_within(1)


def test_a_forecast_is_longer_for_more_work_and_names_what_it_takes(
    tiny_folder: TinyPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    extent = read_extent(tiny_folder())
    assert product_speed(extent, 64) > 0
    little = foresee(Work({64: 1e9}, elements=1e6), extent)
    much = foresee(Work({64: 1e15}, elements=1e6, memory=2**31, disk=2**30, scratch=2**29), extent)
    assert much.seconds > little.seconds
    said = str(much)
    assert said.startswith("about ")
    assert "1.0 GiB of disk, 512.0 MiB in " + str(tmp_path) in said
    assert "disk" not in str(little)


def test_what_does_not_fit_a_disk_is_refused_with_what_is_free(
    small_disk: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk("1M")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    require_room(Work(least_disk=2**19), disk / "new" / "out", "prune")
    with pytest.raises(InputError, match=r"prune takes 2.0 MiB at least, and 1.0 MiB are free.*\(-o\)"):
        require_room(Work(least_disk=2**21), disk / "new" / "out", "prune")
    monkeypatch.setenv("TMPDIR", str(disk))
    with pytest.raises(InputError, match=r"1.4 MiB.*\(TMPDIR\)"):
        require_room(Work(least_disk=700 * 2**10, scratch=700 * 2**10), disk / "out", "prune")
    assert not list(disk.iterdir())


def test_what_does_not_fit_memory_is_refused() -> None:
    with pytest.raises(InputError, match=r"export takes 1024.0 TiB of memory at least"):
        require_room(Work(least_memory=2**50), None, "export")


def test_what_holds_no_decoder_has_no_extent(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError):
        read_extent(tmp_path)


def test_an_extent_knows_its_ends() -> None:
    extent = Extent((((4, 8), (8, 4)),), 10, 4, tied=False)
    assert extent.n_weights == 64 + 80
    assert extent.least_weights == 64 + 40
