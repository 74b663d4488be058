"""Every architecture, tied and untied, uniform and not: llama.cpp's logits of the written file are the model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.models.architectures import decoder_layers, feed_forward
from cfsp.models.families.row import FULL, WINDOWED
from cfsp.models.gguf_file import read_gguf
from cfsp.models.reference import load_model
from cfsp.text.tokens import TokenWindows
from exporters.export_record import ParityReport
from exporters.gguf import runtime
from exporters.gguf.architecture import ChosenLayout, read_layout
from exporters.gguf.writer import write_gguf
from exporters.job import read_provenance
from exporters.proof import compare, reference_of

WIDTHS = (96, 64, 128, 32)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
DEEP_KINDS = ([WINDOWED] * 3 + [FULL]) * 16
DEEP = {"num_hidden_layers": 64, "sliding_window": 24, "intermediate_size": 32}
ALPHA = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0}
DELTA_NET = "linear_attention"
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


def narrow(model: Any, widths: tuple[int, ...]) -> None:
    """Keep the first channels of every FFN."""
    for layer, width in zip(decoder_layers(model), widths, strict=True):
        ffn = feed_forward(model, layer)
        for linear in (ffn.gate, ffn.up):
            linear.weight = nn.Parameter(linear.weight[:width].clone())
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias[:width].clone())
            linear.out_features = width
        ffn.down.weight = nn.Parameter(ffn.down.weight[:, :width].clone())
        ffn.down.in_features = width


def save(model: Any, tokenizer: Any, folder: Path, widths: tuple[int, ...] | None = None) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if widths:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        stated = config.get("per_layer_config", {})
        config["per_layer_config"] = {
            str(i): {**stated.get(str(i), {}), "intermediate_size": width} for i, width in enumerate(widths)
        }
        path.write_text(json.dumps(config))
    return folder


def write(
    model: Any, tokenizer: Any, folder: Path, widths: tuple[int, ...] | None = None
) -> tuple[Path, ChosenLayout]:
    if widths:
        narrow(model, widths)
    save(model, tokenizer, folder, widths)
    path = folder / "model.gguf"
    return path, write_gguf(folder, path, tokenizer, read_provenance(folder))


def measure(model: Any, path: Path, length: int = 200) -> ParityReport:
    windows = torch.randint(
        0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1)
    )
    with runtime.open_model(path, runtime.Context(n_ctx=length, n_batch=64, cache_type="f32")) as opened:
        return compare(reference_of(model, TokenWindows(windows, "random", "")), opened.iter_logits, {})


@pytest.mark.parametrize(
    ("model_type", "overrides", "widths", "architecture"),
    [
        ("llama", {}, None, "llama"),
        ("llama", {"num_key_value_heads": 1, "tied": False, "rope_parameters": LINEAR}, WIDTHS, "deci"),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}, WIDTHS, "deci"),
        ("llama", {"rope_parameters": LLAMA3}, WIDTHS, "deci"),
        ("mistral", {"tied": False}, None, "llama"),
        ("mistral", {}, WIDTHS, "deci"),
        ("qwen2", {}, None, "qwen2"),
        ("qwen2", {"tied": False}, WIDTHS, "deci"),
        ("qwen2", {"head_dim": 32, "rope_parameters": LLAMA3}, None, "deci"),
        ("qwen2", {"rope_parameters": YARN | {"attention_factor": 1.3}}, None, "qwen2"),
        ("qwen3", {"tied": False}, None, "qwen3"),
        ("qwen3", {"head_dim": 32}, WIDTHS, "openelm"),
        ("smollm3", {"head_dim": 32, "num_hidden_layers": 9}, None, "smollm3"),
        ("gemma3_text", {"num_key_value_heads": 1, "head_dim": 32, "tied": False}, None, "gemma3"),
        ("gemma3_text", {"sliding_window_pattern": 6, "num_hidden_layers": 7}, None, "gemma3"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, None, "gemma3"),
        ("gemma4_text", {"num_key_value_heads": 1, "use_double_wide_mlp": False}, None, "gemma4"),
        ("gemma4_text", {"num_kv_shared_layers": 0, "head_dim": 32}, WIDTHS, "gemma4"),
        ("gemma4_text", {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}, None, "gemma4"),
        (
            "gemma4_text",
            {"final_logit_softcapping": 12.0, "sliding_window": 7, "tied": False},
            None,
            "gemma4",
        ),
        ("olmo2", {"tied": False}, None, "olmo2"),
        ("olmo3", {"tied": False, "num_key_value_heads": 4, "num_hidden_layers": 9}, None, "olmo2"),
        ("olmo3", {"tied": False, "rope_scaling": YARN | {"rope_theta": 500000.0}}, None, "olmo2"),
        ("exaone4", {"num_key_value_heads": 1, "rope_parameters": LLAMA3, "tied": False}, None, "exaone4"),
        ("exaone4", DEEP | {"layer_types": DEEP_KINDS[1:] + DEEP_KINDS[:1]}, None, "exaone4"),
        ("hunyuan_v1_dense", {"head_dim": 32, "num_key_value_heads": 1}, None, "hunyuan-dense"),
        ("hunyuan_v1_dense", {"rope_parameters": ALPHA, "tied": False}, None, "hunyuan-dense"),
        (
            "qwen3_5_text",
            {"linear_num_key_heads": 4, "linear_conv_kernel_dim": 3, "head_dim": 32},
            None,
            "qwen35",
        ),
        ("qwen3_5_text", {"layer_types": [FULL, DELTA_NET, DELTA_NET, FULL], "tied": False}, None, "qwen35"),
        ("lfm2", {"num_key_value_heads": 1, "conv_L_cache": 4}, None, "lfm2"),
        ("lfm2", {"layer_types": [FULL, FULL, "conv", "conv"], "tied": False}, None, "lfm2"),
    ],
)
def test_logits_equal_the_models(
    tiny_model: Callable[..., Any],
    tmp_path: Path,
    model_type: str,
    overrides: dict[str, Any],
    widths: tuple[int, ...] | None,
    architecture: str,
) -> None:
    """Within 0.001, or where ggml looks the activation up in float16, predictions that cannot be told apart."""
    model, tokenizer = tiny_model(model_type, **overrides)
    path, chosen = write(model, tokenizer, tmp_path / "hf", widths)
    assert chosen.layout.architecture == architecture
    report = measure(model, path)
    if chosen.exact_limits is None:
        assert report.max_logit_diff < 1e-3
        assert report.same_top1 == 1.0
        assert report.ppl_ratio == pytest.approx(1.0, abs=1e-4)
    else:
        assert report.max_logit_diff < 0.1
        assert report.kl_mean < 2e-5
        assert report.same_top1 > 0.98


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("gemma3_text", {"layer_types": [FULL] * 4}),
        ("gemma3_text", {"layer_types": [FULL] + [WINDOWED] * 3}),
        ("qwen2", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
        ("olmo3", {"tied": False, "rope_scaling": YARN | {"rope_theta": 500000.0}}),
    ],
)
def test_a_file_comes_back_as_it_was(
    tiny_model: Callable[..., Any], tmp_path: Path, model_type: str, overrides: dict[str, Any]
) -> None:
    """It says which blocks have a window, and what scales a rope."""
    model, tokenizer = tiny_model(model_type, **overrides)
    path, _ = write(model, tokenizer, tmp_path / "hf")
    again = load_model(path).model
    assert getattr(again.config, "layer_types", None) == getattr(model.config, "layer_types", None)
    ids = torch.randint(0, 384, (1, 60), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "overrides", "said"),
    [
        ("qwen3", {"tied": False, "widths": WIDTHS}, "qwen3: one FFN width.*--uniform.*openelm: tied"),
        ("gemma3_text", {"widths": WIDTHS}, "gemma3: one FFN width"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "smollm3: a rope in all blocks but each 4th"),
        # It has windows in EXAONE 4 of 64 blocks, whatever the file says.
        (
            "exaone4",
            {"sliding_window": 24, "layer_types": DEEP_KINDS[:4]},
            "exaone4: windows in models of 64",
        ),
        ("exaone4", {"num_hidden_layers": 64}, "exaone4: windows in models of 64 blocks and in no others"),
        ("gemma4_text", {"layer_types": [FULL] * 4, "num_kv_shared_layers": 0}, "a window in some block"),
        ("gemma4_text", {"layer_types": [FULL, WINDOWED, WINDOWED, FULL]}, "from the last two before them"),
        ("gemma4_text", {"attention_bias": True}, "no bias on"),
        ("lfm2", {"layer_types": [FULL] * 4}, "lfm2: a short convolution in some block"),
        ("qwen3_5_text", {"layer_types": [FULL] * 4}, "a gated delta net in some block"),
        (
            "qwen3_5_text",
            {"linear_value_head_dim": 32},
            "key heads and value heads of a delta net of one size",
        ),
        ("qwen3_5_text", {"rope_parameters": HALF | {"mrope_section": [11, 11, 10]}}, "sections of the rope"),
        ("qwen3_5_text", {"rope_parameters": HALF | {"mrope_section": [4, 0, 0]}}, "sections of the rope"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tiny_model: Callable[..., Any], tmp_path: Path, model_type: str, overrides: dict[str, Any], said: str
) -> None:
    """Or what ends its process."""
    widths = overrides.pop("widths", None)
    model, tokenizer = tiny_model(model_type, **overrides)
    if widths:
        narrow(model, widths)
    with pytest.raises(InputError, match=said):
        read_layout(save(model, tokenizer, tmp_path / "hf", widths))


def test_a_gguf_file_with_windows_rotates_as_its_model_does(
    tiny_model: Callable[..., Any], tiny_gguf: Callable[..., Path]
) -> None:
    kinds = [FULL, FULL, WINDOWED, FULL]
    model, _ = tiny_model("exaone4", sliding_window=24, layer_types=kinds)
    again = load_model(tiny_gguf("exaone4", sliding_window=24, layer_types=kinds)).model
    ids = torch.randint(0, 384, (1, 60), generator=torch.Generator().manual_seed(2))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_sliding_window_models_agree_inside_the_window(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model, tokenizer = tiny_model("mistral", sliding_window=64)
    path, _ = write(model, tokenizer, tmp_path / "hf")
    assert read_gguf(path).hyperparameter("context_length") == 64
    assert measure(model, path, length=64).max_logit_diff < 1e-3
    assert measure(model, path, length=200).max_logit_diff > 1e-2
