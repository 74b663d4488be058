"""What weights are kept in: as there is room, or as asked; all that computes with them has float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from far_device import brought, far_device, send
from torch import nn

from cfsp.models.architectures import decoder_layers
from cfsp.models.checkpoint import PLAN_FILE, load_pruned, save_checkpoint
from cfsp.models.offload import VARIABLE, WHOLE, Keeping, held_model, is_paged, keeping_of
from cfsp.models.reference import load_model
from cfsp.models.source import LoadedModel
from cfsp.models.weights import cast_weights, safetensors_files, uniform_dtype, weight_count
from cfsp.precision import rounding_dtype
from cfsp.pruning.plan import PruningPlan
from cfsp.pruning.prune import prune_model
from cfsp.pruning.settings import PruneSettings
from cfsp.records import read_record
from cfsp.text.calibration import Calibration
from phoneready.main import main

TinyPath = Callable[..., Path]
TinyLoaded = Callable[..., LoadedModel]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
IDS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def test_the_first_way_with_room_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, stored, asked, expected in (
        (8000, BF16, "auto", WHOLE),
        (7999, BF16, "auto", Keeping(BF16)),
        (4000, F16, "auto", Keeping(F16)),
        (3999, BF16, "auto", Keeping(BF16, in_files=True)),
        (7999, F32, "auto", Keeping(F32, in_files=True)),
        (7999, None, "auto", WHOLE),
        (8000, BF16, "float32", WHOLE),
        (7999, BF16, "float32", Keeping(BF16, in_files=True)),
        (8000, BF16, "bfloat16", Keeping(BF16)),
        (8000, F32, "float16", Keeping(F16)),
        (3999, BF16, "bfloat16", Keeping(BF16, in_files=True)),
        (3999, F32, "bfloat16", Keeping(BF16)),
        (3999, None, "float16", Keeping(F16)),
    ):
        monkeypatch.setattr("cfsp.models.offload.free_memory", lambda free=free: free)
        assert keeping_of(1000, stored, asked) == expected, (free, stored, asked)


def test_the_environment_goes_before_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfsp.models.offload.free_memory", lambda: 0)
    monkeypatch.setenv(VARIABLE, "never")
    assert keeping_of(1000, BF16) == WHOLE
    assert keeping_of(1000, BF16, "bfloat16") == Keeping(BF16)
    monkeypatch.setattr("cfsp.models.offload.free_memory", lambda: 2**60)
    monkeypatch.setenv(VARIABLE, "always")
    assert keeping_of(1000, BF16) == Keeping(BF16, in_files=True)


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3_5_text"])
def test_every_model_type_computes_with_float32(model_type: str, tiny_folder: TinyPath) -> None:
    folder = tiny_folder(model_type)
    plain = load_model(folder)
    cast_weights(plain.model, BF16)
    cast_weights(plain.model, F32)
    kept = load_model(folder, dtype="bfloat16")
    assert kept.stored_dtype == BF16
    assert kept.source.rounded == "bfloat16"
    assert is_paged(kept.model)
    seen: set[torch.dtype] = set()

    for module in kept.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    with torch.inference_mode():
        assert torch.equal(kept.model(IDS).logits, plain.model(IDS).logits)
    assert seen == {F32}


def test_16_bits_that_are_asked_for_are_what_is_kept_of_a_model(
    tiny_folder: TinyPath, tiny_gguf: TinyPath, tmp_path: Path
) -> None:
    for number, reference in enumerate((tiny_folder(), tiny_gguf())):
        loaded = load_model(reference, dtype="float16")
        assert sum(p.element_size() * p.numel() for p in loaded.model.parameters()) == 2 * sum(
            p.numel() for p in loaded.model.parameters()
        )
        info = save_checkpoint(loaded, tmp_path / str(number))
        assert (info.dtype, info.source.rounded) == ("float16", "float16")
        assert {p.dtype for p in load_pruned(tmp_path / str(number)).parameters()} == {F16}
        again = load_model(tmp_path / str(number), dtype="float16")
        assert again.source.rounded is None  # they are that already


def test_numbers_beyond_float16_are_refused_in_a_line(
    tiny_loaded: TinyLoaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = tiny_loaded()
    with torch.no_grad():
        decoder_layers(loaded.model)[0].mlp.up_proj.weight[0, 0] = 1e5
    save_checkpoint(loaded, tmp_path / "large")
    text = ["--calibration", "builtin:python-docs", "--set", "nsamples=2", "--set", "seqlen=24"]
    command = ["prune", str(tmp_path / "large"), "-o", str(tmp_path / "out"), *text]
    assert main([*command, "--set", "dtype=float16"]) == 2
    error = capsys.readouterr().err
    assert "float16 holds none above 65504" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert main([*command, "--set", "dtype=bfloat16"]) == 0


def test_a_model_of_16_bits_is_pruned_where_it_is(tiny_loaded: TinyLoaded) -> None:
    def pruned(loaded: LoadedModel) -> Any:
        asked = PruneSettings(prune_ratio=0.25, align=8, vocabulary=300)
        return prune_model(loaded, Calibration(IDS, ("random",), 0, "0" * 64), asked)

    def narrow() -> LoadedModel:
        loaded = tiny_loaded(hidden_size=96)
        loaded.model.set_attn_implementation("eager")
        cast_weights(loaded.model, BF16)
        return loaded

    here = narrow()
    held_model(here.model)
    weights = pruned(here).loaded.model.state_dict()
    for float64 in (True, False):
        with far_device(float64=float64):
            there = narrow()
            send(there.model)
            held_model(there.model)
            found = pruned(there).loaded.model.state_dict()
        assert set(found) == set(weights)
        for name, tensor in found.items():
            assert torch.equal(brought(tensor), weights[name]), name


@pytest.mark.parametrize(
    ("options", "products", "stored"),
    [
        (("--set", "dtype=float16"), "float32", F16),
        (("--set", "dtype=float32", "--set", "weights_dtype=bfloat16"), "float32", BF16),
    ],
)
def test_prune_is_told_products_and_weights_together_or_apart(
    options: tuple[str, ...], products: str, stored: torch.dtype, tiny_folder: TinyPath, tmp_path: Path
) -> None:
    text = ["--calibration", "builtin:python-docs", "--set", "nsamples=2", "--set", "seqlen=24"]
    assert main(["prune", str(tiny_folder()), "-o", str(tmp_path / "out"), *text, *options]) == 0
    found = read_record(PruningPlan, tmp_path / "out" / PLAN_FILE).settings.dtype
    assert found == str(rounding_dtype(products)).removeprefix("torch.")
    assert uniform_dtype(safetensors_files(tmp_path / "out")) == stored


def test_an_export_of_16_bits_is_by_blocks_where_float32_takes_too_much(
    tiny_loaded: TinyLoaded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The proof's model is float32: 16 bits that fit are no reason to read all of it."""
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    loaded = tiny_loaded()
    save_checkpoint(replace(loaded, stored_dtype=BF16), tmp_path / "saved")
    n_weights = weight_count(safetensors_files(tmp_path / "saved"), tied=False)
    by_blocks, hashes = [], set()
    for free in (6 * n_weights, 2**60):
        monkeypatch.setattr("cfsp.models.offload.free_memory", lambda free=free: free)
        command = [
            "quantize",
            str(tmp_path / "saved"),
            "-o",
            str(tmp_path / str(free)),
            "--to",
            "Q8_0",
            "--text",
            "none",
        ]
        capsys.readouterr()
        assert main([*command, "--set", "dtype=bfloat16", "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)["exports"]
        by_blocks.append(bool(found["blocks"]))
        hashes.add(found["sha256"])
    assert by_blocks == [True, False]
    assert len(hashes) == 1
