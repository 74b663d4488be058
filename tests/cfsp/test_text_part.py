"""Folders that can see as well: the text part alone is loaded, pruned and exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cfsp.errors import InputError
from cfsp.models.checkpoint import load_pruned
from cfsp.models.offload import VARIABLE
from cfsp.models.reference import load_model
from cfsp.models.weights import cast_weights
from phoneready.main import main

TinyModel = Callable[..., tuple[Any, Any]]
IDS = torch.randint(10, 380, (2, 40), generator=torch.Generator().manual_seed(5))
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
PARTS = {
    "gemma3": ("gemma3_text", {"vision_config": VISION, "mm_tokens_per_image": 4}),
    "gemma4": ("gemma4_text", {"vision_config": VISION | {"head_dim": 16, "num_key_value_heads": 2}}),
    "mistral3": ("ministral3", {"vision_config": VISION | {"model_type": "pixtral", "head_dim": 16}}),
}
LOADED = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "mistral3": "mistral"}
each_type = pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                PARTS[name][0] not in transformers.CONFIG_MAPPING, reason="transformers 4"
            ),
        )
        for name in PARTS
    ],
)


def saved(tiny_model: TinyModel, folder: Path, model_type: str) -> tuple[Path, torch.Tensor]:
    """A folder of a model with eyes, and what it says of a text."""
    text_type, others = PARTS[model_type]
    text, tokenizer = tiny_model(text_type)
    config = transformers.AutoConfig.for_model(model_type, text_config=text.config.to_dict(), **others)
    whole = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.inference_mode():
        return folder, whole(input_ids=IDS).logits


@torch.no_grad()
def test_it_stays_in_no_files_and_computes_with_float32(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = saved(tiny_model, tmp_path / "whole", "gemma3")
    cast_weights(plain := load_model(folder).model, torch.bfloat16)
    cast_weights(plain, torch.float32)
    expected = plain(IDS).logits
    assert torch.equal(load_model(folder, dtype="bfloat16").model(IDS).logits, expected)
    monkeypatch.setenv(VARIABLE, "always")
    whole = load_model(folder, may_stream=True).model
    assert {weight.dtype for weight in whole.parameters()} == {torch.float32}


@torch.inference_mode()
@each_type
def test_it_is_pruned_and_exported(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str
) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    folder, expected = saved(tiny_model, tmp_path / "whole", model_type)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    text = [
        "--calibration",
        "builtin:python-docs",
        "--set",
        "nsamples=2",
        "--set",
        "seqlen=32",
        "--threads",
        "1",
    ]
    for share, out in (("0", "dense"), ("0.25", "pruned")):
        line = ["prune", str(folder), "-o", str(tmp_path / out), "--prune-ratio", share, *text]
        assert main(line) == 0, capsys.readouterr().err
    torch.testing.assert_close(load_pruned(tmp_path / "dense")(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    for reference in (folder, tmp_path / "pruned"):
        out = tmp_path / f"{reference.name}-files"
        line = ["quantize", str(reference), "-o", str(out), "--to", "f32", "--threads", "1", "--text", "none"]
        assert main(line) == 0, capsys.readouterr().err
        assert list(out.glob("*.gguf"))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert main(["doctor", str(folder)]) == 0
    assert f"{LOADED[model_type]}:" in capsys.readouterr().out


def test_what_cannot_be_taken(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder, _ = saved(tiny_model, tmp_path / "whole", "gemma3")
    file, generation = folder / "config.json", folder / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    for change, said in (
        ({"text_config": None}, "nothing is said of the text model"),
        ({"text_config": {"model_type": "mixtral"}}, "unsupported architecture"),
        ({"quantization_config": {"quant_method": "fp8"}}, "holds quantized weights"),
    ):
        file.write_text(json.dumps(settings | change), encoding="utf-8")
        with pytest.raises(InputError, match=said):
            load_model(folder)
    file.write_text(json.dumps(settings), encoding="utf-8")
    for wrong in ({"max_new_tokens": -5}, {"cache_implementation": "nonsense"}):
        generation.write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(InputError, match="generation_config"):
            load_model(folder)


@torch.inference_mode()
def test_what_config_leaves_to_defaults(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder, expected = saved(tiny_model, tmp_path / "whole", "gemma3")
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    for part in (settings, settings["text_config"]):
        part.pop("tie_word_embeddings", None)
    del settings["text_config"]["model_type"]
    file.write_text(json.dumps(settings), encoding="utf-8")
    torch.testing.assert_close(load_model(folder).model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
