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
from cfsp.evaluation.language_model import Branches
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.models.architectures import attention_of, decoder_layers
from cfsp.models.gguf_file import CONVOLUTIONS, read_gguf
from cfsp.models.reference import load_model
from cfsp.pruning.axes.blocks import candidate_blocks
from exporters.export_record import ParityLimits
from exporters.gguf.architecture import read_layout
from exporters.gguf.files import draft_gguf
from exporters.onnx import export_onnx
from exporters.onnx.folder import find_graph
from exporters.onnx.language_model import OnnxLanguageModel
from exporters.onnx.runtime import open_model
from exporters.options import ExportOptions
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


def test_a_target_is_met(tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By channels, tokens and blocks; attentions and groups are no axes of such a model."""
    dense, out = str(tiny_folder("lfm2", intermediate_size=192, num_hidden_layers=6)), tmp_path / "out"
    assert (
        main(["prune", dense, "-o", str(out), "--target-size", "280K", "--for", "Q8_0", *TEXT, "--json"]) == 0
    )
    budget = json.loads(capsys.readouterr().out)["budget"]
    assert budget["dense"] > 280_000 > budget["reached"]
    gone = {one["axis"] for one in budget["axes"] if one["removed"]}
    assert gone <= {"vocabulary", "ffn", "blocks"}
    (tmp_path / "files").mkdir()
    assert draft_gguf(out, tmp_path / "files", ["Q8_0"])["Q8_0"].stat().st_size <= 280_000


@pytest.fixture(scope="module")
def graphs(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX folders of the pruned checkpoint."""
    folder = tmp_path_factory.mktemp("onnx") / "out"
    # Next-token distributions of random weights are nearly flat, so quantization moves them far.
    loose = {name: ParityLimits(kl_mean=3.0) for name in ("int8", "int4")}
    export_onnx(files[0], folder, ("fp32", "int8", "int4"), ExportOptions(limits=loose, n_threads=1))
    return folder


def test_a_graph_is_judged_as_its_checkpoint_is(files: tuple[Path, Path], graphs: Path) -> None:
    """Its cache cannot be rewound, so each continuation reads its context again."""
    ours = TorchLanguageModel(load_model(files[0]))
    theirs = OnnxLanguageModel(str(graphs / "fp32"), n_ctx=256, n_threads=1)
    ids = torch.randint(3, 320, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    items = [Branches(tuple(ids[:9]), ((5,), (5, 6, 7), (8, 9))), Branches(tuple(ids[9:20]), ((4, 3),))]
    scores = [[one.log_likelihood for row in model.score(items) for one in row] for model in (ours, theirs)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    prompts = [ids[:5], ids[5:18], ids[18:21]]
    assert ours.generate(prompts, 32) == theirs.generate(prompts, 32)
    with pytest.raises(InputError, match="rewound"):
        theirs._model.rewind(3)
    theirs.close()


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


@pytest.mark.parametrize("variant", ["fp32", "int8", "int4"])
def test_genai_generates_what_the_graph_generates(graphs: Path, variant: str) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model, ids = genai.Model(str(graphs / variant)), list(range(40, 60))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=64)
    generator = genai.Generator(model, parameters)
    for piece in (ids[:9], ids[9:]):
        generator.append_tokens(piece)
    graph = open_model(find_graph(str(graphs / variant), last_logits=True), n_ctx=64, n_threads=1)
    logits = graph.decode(ids)
    for _ in range(32):
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        assert token == int(logits[-1].argmax())
        if generator.is_done():
            break
        logits = graph.decode([token])


@pytest.mark.parametrize("engine", ["onnxruntime", "onnxruntime-genai"])
def test_a_folder_is_measured(graphs: Path, capsys: pytest.CaptureFixture[str], engine: str) -> None:
    size = ["-p", "16", "-n", "4", "-d", "8", "-r", "1", "-t", "1", "--no-text-check"]
    assert main(["bench", str(graphs / "int8"), "--engine", engine, *size, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["workload"] for row in rows} >= {"pp", "tg"}


def test_optimum_is_refused_in_a_line(
    tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["export", str(tiny_folder("lfm2")), "-o", out, "--onnx", "int8,portable"]) == 2
    said = capsys.readouterr().err
    assert "optimum exports no blocks with a short convolution" in said
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
    assert candidate_blocks(model) == [2, 3]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layer_types": ["conv"] * 4}, "no block attends"),
        ({"conv_L_cache": 1}, "conv_L_cache"),
        ({"norm_eps": 0}, "norm_eps"),
    ],
)
def test_folders_of_no_such_model(tiny_folder: TinyPath, settings: dict[str, Any], said: str) -> None:
    file = tiny_folder("lfm2") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(InputError, match=said) as caught:
        load_model(file.parent)
    assert "\n" not in str(caught.value)
