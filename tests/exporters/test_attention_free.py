"""Blocks without attention in every family of files: proven against the checkpoint, or refused in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cfsp.errors import InputError
from cfsp.models.gguf_file import read_gguf
from cfsp.models.reference import load_tokenizer
from exporters.export_record import ParityLimits
from exporters.family import ExportOptions
from exporters.gguf.export import export_gguf
from exporters.onnx import export_onnx
from exporters.onnx.runtime import open_model
from runtime_bench.devices.model_facts import gguf_facts

WINDOWS = torch.randint(0, 384, (2, 96), generator=torch.Generator().manual_seed(0))
# Next-token distributions of random weights are nearly flat, so quantization moves them far.
LOOSE = {name: ParityLimits(kl_mean=3.0) for name in ("Q8_0", "Q4_K_M", "int4")}
OPTIONS = ExportOptions(limits=LOOSE, parity_windows=WINDOWS, calibration=WINDOWS, n_threads=1)
SILENT = (2, 3)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_llama_cpp_computes_the_checkpoint(make_checkpoint: Any, tmp_path: Path, model_type: str) -> None:
    widths = (96, 64, 128, 32) if model_type == "llama" else None
    checkpoint = make_checkpoint(model_type, widths=widths, silent=SILENT)
    quants = ("f32", "Q8_0", "Q4_K_M") if model_type == "llama" else ("f32",)
    record, *_ = export_gguf(checkpoint, tmp_path / "out", quants, OPTIONS)
    assert record.parity.max_logit_diff <= 1e-3
    path = tmp_path / "out" / record.file
    file = read_gguf(path)
    assert file.architecture == "deci"
    assert list(file.require("deci.attention.head_count")) == [4, 4, 0, 0]
    assert list(file.require("deci.attention.head_count_kv")) == [2, 2, 0, 0]
    assert not any(tensor.name.startswith(("blk.2.attn", "blk.3.attn")) for tensor in file.tensors)
    # Two blocks of two key-value heads, of 16 numbers each for keys and for values.
    assert gguf_facts(path).key_value_width == 2 * 2 * 2 * 16


def test_what_llama_cpp_cannot_say_is_refused(make_checkpoint: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="qwen3: no blocks without attention, whole blocks can go"):
        export_gguf(make_checkpoint("qwen3", silent=SILENT), tmp_path / "out", ("f32",), OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def graphs(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """(checkpoint, its ONNX folders); the block before the last does not attend."""
    checkpoint = make_checkpoint("qwen3", silent=(1, 2))
    folder = tmp_path_factory.mktemp("onnx") / "out"
    export_onnx(checkpoint, folder, ("fp32", "int4"), OPTIONS)
    return checkpoint, folder


def test_the_graph_has_caches_of_those_that_attend(graphs: tuple[Path, Path]) -> None:
    folder = graphs[1] / "fp32"
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] == 2
    model = open_model(folder / "onnx" / "model.onnx", n_ctx=64, n_threads=1)
    assert sorted(model._caches) == [
        f"past_key_values.{index}.{part}" for index in (0, 1) for part in ("key", "value")
    ]


def test_genai_generates_what_the_graph_generates(graphs: tuple[Path, Path]) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    checkpoint, folder = graphs
    ids = load_tokenizer(checkpoint)("List three fruits: an apple, ", add_special_tokens=False)["input_ids"]
    for variant, stem in (("fp32", "model"), ("int4", "model_q4")):
        model = genai.Model(str(folder / variant))
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + 8)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(ids)
        graph = open_model(folder / variant / "onnx" / f"{stem}_last.onnx", n_ctx=64, n_threads=1)
        logits = graph.decode(ids)
        for _ in range(6):
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            assert token == int(logits[-1].argmax())
            logits = graph.decode([token])


def test_optimum_is_refused(make_checkpoint: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="optimum gives every block a cache"):
        export_onnx(make_checkpoint("llama", silent=(2,)), tmp_path / "out", ("fp32", "portable"), OPTIONS)
    assert not list(tmp_path.iterdir())
