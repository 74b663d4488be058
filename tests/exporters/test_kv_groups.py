"""Blocks with numbers of key-value heads of their own in every family of files: proven, or refused in words."""

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
LOOSE = {name: ParityLimits(kl_mean=3.0) for name in ("Q8_0", "Q4_K_M", "int8", "int4")}
OPTIONS = ExportOptions(limits=LOOSE, parity_windows=WINDOWS, calibration=WINDOWS, n_threads=1)
GROUPS = {0: (1,), 2: (0, 2, 3)}
EVERY = dict.fromkeys(range(4), (1,))


@pytest.mark.parametrize(
    ("model_type", "tied", "groups", "architecture"),
    [
        ("llama", True, GROUPS, "deci"),
        ("mistral", False, GROUPS, "deci"),
        ("qwen2", False, GROUPS, "deci"),
        ("qwen3", True, GROUPS, "openelm"),
        ("llama", True, EVERY, "llama"),
        ("qwen2", True, EVERY, "deci"),
        ("qwen3", False, EVERY, "qwen3"),
    ],
)
def test_llama_cpp_computes_the_checkpoint(
    make_checkpoint: Any,
    tmp_path: Path,
    model_type: str,
    tied: bool,
    groups: dict[int, tuple[int, ...]],
    architecture: str,
) -> None:
    overrides = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}
    checkpoint = make_checkpoint(model_type, tied, groups=groups, **overrides)
    quants = ("f32", "Q8_0", "Q4_K_M") if groups is GROUPS and model_type == "llama" else ("f32",)
    record, *_ = export_gguf(checkpoint, tmp_path / "out", quants, OPTIONS)
    assert record.parity.max_logit_diff <= 1e-3
    path = tmp_path / "out" / record.file
    file = read_gguf(path)
    assert file.architecture == architecture
    kv_heads = [len(groups.get(block, range(4))) for block in range(4)]
    stated = file.require(f"{architecture}.attention.head_count_kv")
    assert stated == kv_heads[0] if groups is EVERY else list(stated) == kv_heads
    stated = file.require(f"{architecture}.attention.head_count")
    assert stated == 2 if groups is EVERY else list(stated) == [2 * n for n in kv_heads]
    assert gguf_facts(path).key_value_width == sum(kv_heads) * 2 * 16


def test_beside_blocks_of_other_widths_and_without_attention(make_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", widths=(96, 64, 128, 32), silent=(3,), groups={1: (0,)})
    record, *_ = export_gguf(checkpoint, tmp_path / "gguf", ("f32",), OPTIONS)
    assert record.architecture == "deci"
    record, *_ = export_onnx(checkpoint, tmp_path / "onnx", ("fp32",), OPTIONS)
    assert record.parity.max_logit_diff <= 2e-3


def test_what_llama_cpp_cannot_say_is_refused(make_checkpoint: Any, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"qwen3: as many heads in every block, whole blocks can go.*; openelm: tied embeddings",
    ):
        export_gguf(make_checkpoint("qwen3", False, groups={1: (0,)}), tmp_path / "out", ("f32",), OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def graphs(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """(records, ONNX folders) of a model in which one block has half of the key-value heads."""
    folder = tmp_path_factory.mktemp("onnx") / "out"
    checkpoint = make_checkpoint("qwen3", groups={1: (1,)})
    return export_onnx(checkpoint, folder, ("fp32", "int8", "int4"), OPTIONS), folder


def test_every_cache_has_its_block_s_heads(graphs: tuple[Any, Path]) -> None:
    records, folder = graphs
    assert records[0].parity.max_logit_diff <= 2e-3
    model = open_model(folder / "fp32" / "onnx" / "model.onnx", n_ctx=64, n_threads=1)
    heads = {name: model._inputs[name].shape[1] for name in model._caches if name.endswith("key")}
    assert list(heads.values()) == [2, 1, 2, 2]


def test_who_takes_one_number_of_heads_is_told(graphs: tuple[Any, Path]) -> None:
    for record in graphs[0]:
        assert any("optimum's ORTModelForCausalLM" in warning for warning in record.warnings)


@pytest.mark.parametrize("groups", [{0: (1,)}, {1: (1,), 2: (0,)}, EVERY])
def test_genai_generates_what_the_graph_generates(
    make_checkpoint: Any, tmp_path: Path, groups: dict[int, tuple[int, ...]]
) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    checkpoint = make_checkpoint("llama", groups=groups, widths=(64, 96, 128, 64))
    record, *_ = export_onnx(checkpoint, tmp_path / "out", ("fp32",), OPTIONS)
    assert bool(record.warnings) == (groups is not EVERY)
    folder = tmp_path / "out" / "fp32"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["num_key_value_heads"] == (1 if groups is EVERY else 2)
    assert config["num_attention_heads"] == 4
    ids = load_tokenizer(checkpoint)("List three fruits: an apple, ", add_special_tokens=False)["input_ids"]
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + 8)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    graph = open_model(folder / "onnx" / "model_last.onnx", n_ctx=64, n_threads=1)
    logits = graph.decode(ids)
    for _ in range(6):
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        assert token == int(logits[-1].argmax())
        logits = graph.decode([token])


def test_optimum_is_refused(make_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", groups={2: (1,)})
    with pytest.raises(InputError, match=r"optimum gives every block a cache of the same heads.*2, 2, 1, 2"):
        export_onnx(checkpoint, tmp_path / "out", ("fp32", "portable"), OPTIONS)
    assert not list(tmp_path.iterdir())
