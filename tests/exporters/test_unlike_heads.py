"""Blocks without attention, and with key-value heads of their own, in every kind of file: proven, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cfsp.errors import InputError
from cfsp.models.gguf_file import read_gguf
from exporters.export_record import ParityLimits
from exporters.family import ExportOptions
from exporters.gguf.export import export_gguf
from exporters.onnx import export_onnx
from exporters.onnx.runtime import open_model
from runtime_bench.devices import gguf_facts

WINDOWS = torch.randint(0, 384, (2, 96), generator=torch.Generator().manual_seed(0))
# Next-token distributions of random weights are nearly flat, so quantization moves them far.
LOOSE = {name: ParityLimits(kl_mean=3.0) for name in ("Q8_0", "Q4_K_M", "int8", "int4")}
OPTIONS = ExportOptions(limits=LOOSE, parity_windows=WINDOWS, calibration=WINDOWS, n_threads=1)
GROUPS = {0: (1,), 2: (0, 2, 3)}
EVERY = dict.fromkeys(range(4), (1,))


@pytest.mark.parametrize(
    ("model_type", "tied", "changes", "architecture"),
    [
        ("llama", True, {"groups": GROUPS, "silent": (3,), "widths": (96, 64, 128, 32)}, "deci"),
        ("qwen3", True, {"groups": GROUPS}, "openelm"),
        ("qwen3", False, {"groups": EVERY}, "qwen3"),
    ],
)
def test_llama_cpp_computes_the_checkpoint(
    make_checkpoint: Any,
    tmp_path: Path,
    model_type: str,
    tied: bool,
    changes: dict[str, Any],
    architecture: str,
) -> None:
    overrides = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}
    checkpoint = make_checkpoint(model_type, tied, **changes, **overrides)
    quants = ("f32", "Q8_0", "Q4_K_M") if "widths" in changes else ("f32",)
    record, *_ = export_gguf(checkpoint, tmp_path / "out", quants, OPTIONS)
    assert record.parity.max_logit_diff <= 1e-3
    path = tmp_path / "out" / record.file
    file, groups, silent = read_gguf(path), changes.get("groups", {}), changes.get("silent", ())
    assert file.architecture == architecture
    kv_heads = [0 if block in silent else len(groups.get(block, range(4))) for block in range(4)]
    stated = [file.require(f"{architecture}.attention.{key}") for key in ("head_count_kv", "head_count")]
    heads = [2 * n for n in kv_heads]
    assert stated == ([1, 2] if groups is EVERY else [kv_heads, heads])
    gone = tuple(f"blk.{block}.attn" for block in silent)
    assert not any(tensor.name.startswith(gone) for tensor in file.tensors if gone)
    assert gguf_facts(path).key_value_width == sum(kv_heads) * 2 * 16


def test_what_a_runtime_cannot_say_is_refused(make_checkpoint: Any, tmp_path: Path) -> None:
    for said, tied, changes in (
        ("qwen3: no blocks without attention, whole blocks can go", True, {"silent": (2, 3)}),
        (r"as many heads in every block, whole.*; openelm: tied embeddings", False, {"groups": {1: (0,)}}),
    ):
        with pytest.raises(InputError, match=said):
            export_gguf(make_checkpoint("qwen3", tied, **changes), tmp_path / "out", ("f32",), OPTIONS)
    for said, model_type, changes in (
        ("optimum gives every block a cache", "llama", {"silent": (2,)}),
        (r"optimum gives every block a cache of the same heads.*2, 2, 1, 2", "llama", {"groups": {2: (1,)}}),
        ("optimum exports no blocks with something else in the place of attention", "lfm2", {}),
    ):
        checkpoint = make_checkpoint(model_type, **changes)
        with pytest.raises(InputError, match=said):
            export_onnx(checkpoint, tmp_path / "out", ("fp32", "portable"), OPTIONS)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module", params=[{1: (1,)}, EVERY], ids=["one", "every"])
def graphs(
    request: pytest.FixtureRequest,
    make_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Any, Path]:
    """(checkpoint, records, ONNX folders): half of the heads in one block and no attention in another, or all alike."""
    folder = tmp_path_factory.mktemp("onnx") / "out"
    silent = () if request.param is EVERY else (2,)
    checkpoint = make_checkpoint("llama", groups=request.param, silent=silent, widths=(64, 96, 128, 64))
    return checkpoint, export_onnx(checkpoint, folder, ("fp32",), OPTIONS), folder


def test_every_cache_has_its_block_s_heads(graphs: tuple[Path, Any, Path]) -> None:
    _, records, folder = graphs
    assert records[0].parity.max_logit_diff <= 2e-3
    config = json.loads((folder / "fp32" / "config.json").read_text(encoding="utf-8"))
    model = open_model(folder / "fp32" / "onnx" / "model.onnx", n_ctx=64, n_threads=1)
    heads = [model._inputs[name].shape[1] for name in sorted(model._caches) if name.endswith("key")]
    assert len(heads) == config["num_hidden_layers"]
    assert config["num_attention_heads"] == 4
    if len(heads) == 4:
        assert heads == [1] * 4
        assert not records[0].warnings
    else:
        assert heads == [2, 1, 2]
        assert any("optimum's ORTModelForCausalLM" in warning for warning in records[0].warnings)
