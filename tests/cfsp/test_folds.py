"""Model types that are loaded as another one: it computes what they compute."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from cfsp.errors import InputError
from cfsp.models.architectures import model_shape
from cfsp.models.checkpoint import load_pruned
from cfsp.models.families import FOLDS
from cfsp.models.reference import load_model
from cfsp.records import read_record
from exporters.export_record import ExportManifest
from phoneready.main import main

TinyModel = Callable[..., tuple[Any, Any]]
OWN = {
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.11,
    "logits_scaling": 4.0,
}
IDS = torch.randint(0, 380, (2, 48), generator=torch.Generator().manual_seed(2))


GRANITE4 = {
    **OWN,
    "num_local_experts": 0,
    "layer_types": ["attention"] * 4,
    "position_embedding_type": "rope",
    "shared_intermediate_size": 128,
}
LONGROPE = {
    "partial_rotary_factor": 0.75,
    "max_position_embeddings": 2048,
    "original_max_position_embeddings": 256,
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 9.0],
    },
}
MINISTRAL = {
    "max_position_embeddings": 2048,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "llama_4_scaling_beta": 0.1,
    },
}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("granite", {**OWN, "tied": False}),
    ("granite", {**OWN, "head_dim": 32}),
    ("granitemoehybrid", {**GRANITE4, "tied": False, "attention_bias": True}),
    ("ernie4_5", {"tied": False, "use_bias": True, "head_dim": 32}),
    ("phi3", {"num_key_value_heads": 1, "tied": False}),
    ("phi3", LONGROPE),
    ("ministral3", MINISTRAL),
    ("lfm2", {"block_auto_adjust_ff_dim": True, "intermediate_size": 200, "block_multiple_of": 32}),
    ("lfm2", {"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.3, "tied": False}),
]
each_model = pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        pytest.param(
            *model, marks=pytest.mark.skipif(model[0] not in CONFIG_MAPPING, reason="transformers 4")
        )
        for model in MODELS
    ],
    ids=str,
)


def saved(
    tiny_model: TinyModel, folder: Path, model_type: str = "granite", **overrides: Any
) -> tuple[Path, torch.Tensor]:
    """A folder of a model, and its logits."""
    model, tokenizer = tiny_model(model_type, **overrides)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.inference_mode():
        return folder, model(IDS).logits


@torch.inference_mode()
@each_model
def test_a_folder_computes_the_same_as_the_other_type(
    tiny_model: TinyModel, tmp_path: Path, model_type: str, overrides: dict[str, Any]
) -> None:
    folder, expected = saved(tiny_model, tmp_path / "folder", model_type, **overrides)
    loaded = load_model(folder)
    assert loaded.model.config.model_type == FOLDS[model_type].target
    if model_type == "ministral3":  # in which it is a Mistral
        assert loaded.model.config.max_position_embeddings == 256
    tied = loaded.model.get_input_embeddings().weight is loaded.model.get_output_embeddings().weight
    assert tied == overrides.get("tied", True)
    torch.testing.assert_close(loaded.model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_pruned_phi_becomes_files(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    folder, _ = saved(tiny_model, tmp_path / "folder", "phi3", **LONGROPE)
    pruned, out = tmp_path / "pruned", tmp_path / "out"
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
    assert main(["prune", str(folder), "-o", str(pruned), "--prune-ratio", "0.25", *text]) == 0
    assert len(set(model_shape(load_pruned(pruned)).ffn_widths)) > 1
    line = ["quantize", str(pruned), "-o", str(out), "--to", "f32,fp32", "--threads", "1", "--text", "none"]
    assert main(line) == 0, capsys.readouterr().err  # both are proven to compute the checkpoint
    contexts = {}
    for family in ("gguf", "onnx"):
        (record,) = read_record(ExportManifest, out / family / "export.json").exports
        contexts[family] = record.context_length, len(record.warnings)
    assert contexts == {"gguf": (2048, 0), "onnx": (256, 1)}


LIKE_GRANITE4 = [
    ({"num_local_experts": 4}, "granitemoehybrid models with experts are not supported"),
    ({"layer_types": ["attention", "mamba", "attention", "mamba"]}, "blocks with a Mamba layer"),
    ({"position_embedding_type": "nope"}, "attention without a rope"),
]
LIKE_GRANITE = [({"residual_multiplier": value}, "residual_multiplier") for value in (0.0, 1e9, "x")]
LIKE_PHI3 = [
    ({"short_factor": [1.0] * 5}, "short_factor has 5 entries for 6 frequencies"),
    ({"long_factor": [0.0] * 6}, "long_factor"),
    ({"partial_rotary_factor": 0.05}, "no even number"),
]


def test_what_no_model_of_the_type_is(tiny_model: TinyModel, tmp_path: Path) -> None:
    for model_type, own, cases in (
        ("granitemoehybrid", GRANITE4, LIKE_GRANITE4),
        ("granite", OWN, LIKE_GRANITE),
        ("phi3", LONGROPE, LIKE_PHI3),
    ):
        folder, _ = saved(tiny_model, tmp_path / model_type, model_type, **own)
        file = folder / "config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        rope = "rope_parameters" if "rope_parameters" in settings else "rope_scaling"
        for change, said in cases:
            changed = {rope: settings[rope] | change} if model_type == "phi3" else change
            file.write_text(json.dumps(settings | changed), encoding="utf-8")
            with pytest.raises(InputError, match=said):
                load_model(folder)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("model_type", "own", "tied"), [("granite", OWN, True), ("ernie4_5", {}, False)], ids=str
)
def test_a_gguf_file_computes_what_llama_cpp_computes(
    tiny_gguf: Any, model_type: str, own: dict[str, Any], tied: bool
) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    from exporters.gguf import runtime

    file = tiny_gguf(model_type, tied, **own)
    with runtime.open_model(file, runtime.Context(n_ctx=64, n_batch=64, cache_type="f32")) as opened:
        pieces = [torch.from_numpy(piece.copy()) for piece in opened.iter_logits(IDS[0].numpy())]
    loaded = load_model(file)
    assert loaded.model.config.model_type == "llama"
    torch.testing.assert_close(loaded.model(IDS).logits[0], torch.cat(pieces), rtol=1e-3, atol=1e-3)


def test_factors_that_no_file_has(tiny_gguf: Any) -> None:
    file = tiny_gguf("granite", **OWN)
    good = file.read_bytes()
    kinds = [(6, float("nan")), (6, -1.0), (6, 1e30), (4, 6.0)]
    keys = ["embedding_scale", "residual_scale", "attention.scale", "logit_scale"]
    for key, kind in zip(keys, kinds, strict=True):
        content, name = bytearray(good), f"granite.{key}".encode()
        place = content.index(name) + len(name)  # the value's type, and the value
        content[place : place + 8] = struct.pack("<If", *kind)
        file.write_bytes(content)
        with pytest.raises(InputError):
            load_model(file)
