"""Models of which most blocks have a short convolution in the place of attention (LFM 2)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

from cfsp.errors import InputError
from cfsp.models.architectures import attention_of, decoder_layers
from cfsp.models.gguf_file import CONVOLUTIONS, read_gguf
from cfsp.models.reference import load_model
from cfsp.pruning.parts import removable_blocks
from exporters.family import ExportOptions
from exporters.gguf.architecture import read_layout
from exporters.onnx import export_onnx
from phoneready.main import main

TinyPath = Callable[..., Path]
TEXT = ["--calibration", "builtin:python-docs", "--nsamples", "2", "--seqlen", "32", "--threads", "1"]


@pytest.fixture(scope="module")
def files(tiny_folder: TinyPath, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pruned checkpoint that lost channels, tokens and blocks, and its GGUF files."""
    folder = tmp_path_factory.mktemp("files")
    dense = str(tiny_folder("lfm2", intermediate_size=192, num_hidden_layers=6))
    removed = ["--prune-ratio", "0.25", "--vocabulary", "330", "--blocks", "2", "--for", "Q8_0"]
    assert main(["prune", dense, "-o", str(folder / "pruned"), *removed, *TEXT]) == 0
    made = ["--gguf", "f32,f16,Q8_0,Q4_K_M", "--threads", "1"]
    assert main(["export", str(folder / "pruned"), "-o", str(folder / "gguf"), *made]) == 0
    return folder / "pruned", folder / "gguf"


def test_what_pruning_leaves_is_proven_in_every_type(files: tuple[Path, Path]) -> None:
    records = {one["quant"]: one for one in json.loads((files[1] / "export.json").read_text())["exports"]}
    assert records["f32"]["parity"]["max_logit_diff"] < 1e-3
    assert records["f32"]["parity"]["same_top1"] == 1
    for record in records.values():
        assert record["architecture"] == "lfm2"
        assert not any(name.endswith(CONVOLUTIONS) for one in record["fallbacks"] for name in one["tensors"])
        kernels = [t for t in read_gguf(files[1] / record["file"]).tensors if t.name.endswith(CONVOLUTIONS)]
        assert {tensor.kind.name for tensor in kernels} == {"F32"}


def test_a_file_is_judged_as_its_checkpoint_is(
    files: tuple[Path, Path], judged_alike: Callable[..., None]
) -> None:
    """Every continuation and every prompt by itself: tokens of a row see what stands before them."""
    judged_alike(files, 1e-3, n_ids=40, context=9, last=21, n_tokens=12)


def test_a_gguf_file_is_a_source(files: tuple[Path, Path]) -> None:
    (path,) = files[1].glob("*f32.gguf")
    ids = torch.arange(60).view(2, 30)
    assert torch.equal(load_model(path).model(ids).logits, load_model(files[0]).model(ids).logits)


def test_a_folder_may_name_the_blocks_that_attend(tiny_folder: TinyPath, tmp_path: Path) -> None:
    """As the first published ones do; GenAI and transformers.js read what every block is."""
    folder = tiny_folder("lfm2")
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    kinds = settings.pop("layer_types")
    file.write_text(json.dumps(settings | {"full_attn_idxs": [1, 3]}))
    export_onnx(folder, tmp_path / "out", ["fp32"], ExportOptions(n_threads=1))
    written = tmp_path / "out" / "fp32"
    assert json.loads((written / "config.json").read_text())["layer_types"] == kinds
    genai = json.loads((written / "genai_config.json").read_text())["model"]
    assert (genai["type"], genai["decoder"]["layer_types"]) == ("lfm2", kinds)


def test_optimum_is_refused_in_a_line(
    tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["export", str(tiny_folder("lfm2")), "-o", out, "--onnx", "int8,portable"]) == 2
    said = capsys.readouterr().err
    assert "optimum exports no blocks with something else in the place of attention" in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_llama_cpp_is_given_no_file_without_a_convolution(tiny_folder: TinyPath) -> None:
    """It would end the process."""
    with pytest.raises(InputError, match="lfm2: a short convolution in some block"):
        read_layout(tiny_folder("lfm2", layer_types=["full_attention"] * 4))


def test_a_block_that_attends_stays(tiny_loaded: Callable[..., Any]) -> None:
    model = tiny_loaded("lfm2").model
    attending = [bool(attention_of(model, layer)) for layer in decoder_layers(model)]
    assert attending == [False, True, False, True]
    assert removable_blocks(model) == [2, 3]


def test_folders_of_no_such_model(tiny_folder: TinyPath) -> None:
    file = tiny_folder("lfm2") / "config.json"
    own = json.loads(file.read_text())
    for settings, said in (
        ({"layer_types": ["conv"] * 4}, "no block attends"),
        ({"conv_L_cache": 1}, "conv_L_cache"),
        ({"norm_eps": 0}, "norm_eps"),
    ):
        file.write_text(json.dumps(own | settings))
        with pytest.raises(InputError, match=said) as caught:
            load_model(file.parent)
        assert "\n" not in str(caught.value)
