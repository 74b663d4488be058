"""Granite as a Llama: weights that hold its factors compute what it computes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cfsp.errors import InputError
from cfsp.models.checkpoint import load_pruned
from cfsp.models.reference import load_model
from phoneready.main import main

TinyModel = Callable[..., tuple[Any, Any]]
OWN = {
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.11,
    "logits_scaling": 4.0,
}
IDS = torch.randint(0, 380, (2, 48), generator=torch.Generator().manual_seed(2))


def saved(tiny_model: TinyModel, folder: Path, **overrides: Any) -> tuple[Path, torch.Tensor]:
    """A folder of a Granite, and its logits."""
    model, tokenizer = tiny_model("granite", **{**OWN, **overrides})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.inference_mode():
        return folder, model(IDS).logits


@torch.inference_mode()
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tied": False},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 1, "tied": False, "attention_bias": True},
        {"head_dim": 32},
    ],
    ids=str,
)
def test_a_folder_computes_the_same_as_a_llama(
    tiny_model: TinyModel, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    folder, expected = saved(tiny_model, tmp_path / "granite", **overrides)
    loaded = load_model(folder)
    assert loaded.model.config.model_type == "llama"
    tied = loaded.model.get_input_embeddings().weight is loaded.model.get_output_embeddings().weight
    assert tied == overrides.get("tied", True)
    torch.testing.assert_close(loaded.model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_pruned_one_is_a_checkpoint_like_any_other(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected = saved(tiny_model, tmp_path / "granite")
    sizes = ["--calibration", "builtin:python-docs", "--nsamples", "2", "--seqlen", "32"]
    line = ["prune", str(folder), "-o", str(tmp_path / "out"), "--prune-ratio", "0.25", "--vocabulary", "300"]
    assert main([*line, *sizes, "--threads", "1"]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["model_type"] == "llama"
    assert load_pruned(tmp_path / "out").model.layers[0].mlp.up_proj.out_features < 128
    # With all channels and tokens it is the dense model.
    whole = [
        "prune",
        str(folder),
        "-o",
        str(tmp_path / "whole"),
        "--prune-ratio",
        "0",
        *sizes,
        "--threads",
        "1",
    ]
    assert main(whole) == 0, capsys.readouterr().err
    torch.testing.assert_close(load_pruned(tmp_path / "whole")(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_dense_folder_is_exported_as_the_llama_that_it_is_loaded_as(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    from exporters.gguf import runtime

    folder, expected = saved(tiny_model, tmp_path / "granite")
    line = ["export", str(folder), "-o", str(tmp_path / "out"), "--gguf", "f32", "--threads", "1"]
    assert main(line) == 0, capsys.readouterr().err
    (file,) = (tmp_path / "out").glob("*.gguf")
    with runtime.open_model(file, n_ctx=64, n_batch=64, kv_f32=True) as opened:
        logits = torch.cat([torch.from_numpy(piece.copy()) for piece in opened.iter_logits(IDS[0].numpy())])
    torch.testing.assert_close(logits, expected[0], rtol=1e-3, atol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_computes_what_llama_cpp_computes(tiny_gguf: Any, tied: bool) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    from exporters.gguf import runtime

    file = tiny_gguf("granite", tied, **OWN)
    with runtime.open_model(file, n_ctx=64, n_batch=64, kv_f32=True) as opened:
        pieces = [torch.from_numpy(piece.copy()) for piece in opened.iter_logits(IDS[0].numpy())]
    loaded = load_model(file)
    assert loaded.model.config.model_type == "llama"
    torch.testing.assert_close(loaded.model(IDS).logits[0], torch.cat(pieces), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [(6, float("nan")), (6, -1.0), (6, 1e30), (4, 6.0), (7, 6.0)], ids=str)
@pytest.mark.parametrize("key", ["embedding_scale", "residual_scale", "attention.scale", "logit_scale"])
def test_factors_that_no_file_has(tiny_gguf: Any, key: str, kind: tuple[int, float]) -> None:
    file = tiny_gguf("granite", **OWN)
    content, name = bytearray(file.read_bytes()), f"granite.{key}".encode()
    place = content.index(name) + len(name)  # the value's type, and the value
    content[place : place + 8] = struct.pack("<If", *kind)
    file.write_bytes(content)
    with pytest.raises(InputError):
        load_model(file)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e9, 1e-300, None, "x"])
def test_factors_that_no_model_has(tiny_model: TinyModel, tmp_path: Path, value: Any) -> None:
    folder, _ = saved(tiny_model, tmp_path / "granite")
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"residual_multiplier": value}
    file.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(InputError, match="residual_multiplier"):
        load_model(folder)
