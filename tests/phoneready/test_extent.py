"""How much of a model there is, by the heads of its files; and what cannot fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cfsp.errors import InputError
from cfsp.models.architectures import state_size
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.offload import VARIABLE, WHOLE, is_paged
from cfsp.models.reference import load_model
from cfsp.models.source import LoadedModel, ModelSource
from phoneready.room import Needs, read_extent, require_room

TinyPath = Callable[..., Path]


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


def test_weights_count_as_in_files_where_the_loader_leaves_them_there(
    tiny_folder: TinyPath, tiny_gguf: TinyPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "always")
    for path in (tiny_folder(), tiny_gguf("gemma4_text")):
        assert read_extent(path).by_blocks == is_paged(load_model(path, may_stream=True).model)


def test_a_text_part_counts_as_in_memory(tiny_folder: TinyPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "always")
    folder = tiny_folder("gemma3_text")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    whole = {"model_type": "gemma3", "text_config": config, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    named = {f"language_model.{name}": weight for name, weight in weights.items()}
    safetensors.torch.save_file(named, folder / "model.safetensors")
    assert not is_paged(load_model(folder, may_stream=True).model)
    assert not read_extent(folder).by_blocks
    assert read_extent(folder, "bfloat16").keeping == WHOLE  # as which it is read
    assert read_extent(tiny_folder(), "bfloat16").keeping.dtype == torch.bfloat16


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
    with pytest.raises(InputError, match=r"export takes 1024.0 TiB of memory at least"):
        require_room(Needs(memory=2**50), None, "export")
    assert not list(disk.iterdir())
