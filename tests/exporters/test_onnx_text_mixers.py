"""ONNX graphs of models with something else in the place of attention: short convolutions, gated delta nets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

from cfsp.errors import InputError
from cfsp.evaluation.language_model import Branches
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.models.reference import load_model
from exporters.export_record import ParityLimits
from exporters.family import ExportOptions
from exporters.onnx import export_onnx
from exporters.onnx.folder import find_graph
from exporters.onnx.language_model import OnnxLanguageModel
from exporters.onnx.runtime import open_model
from phoneready.main import main

TinyPath = Callable[..., Path]
TEXT = ["--calibration", "builtin:python-docs", "--nsamples", "2", "--seqlen", "32", "--threads", "1"]
VARIANTS = ("fp32", "fp16", "int8", "int8-dynamic", "int4")


@pytest.fixture(scope="module", params=["lfm2", "qwen3_5_text"])
def pruned(
    request: pytest.FixtureRequest, tiny_folder: TinyPath, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint that lost channels, tokens and a block."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    dense = str(tiny_folder(request.param, intermediate_size=192, num_hidden_layers=6))
    removed = ["--prune-ratio", "0.25", "--vocabulary", "330", "--blocks", "1"]
    assert main(["prune", dense, "-o", str(out), *removed, *TEXT]) == 0
    return out


@pytest.fixture(scope="module")
def graphs(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its ONNX folders."""
    folder = tmp_path_factory.mktemp("onnx") / "out"
    # Next-token distributions of random weights are nearly flat, so quantization moves them far.
    loose = {name: ParityLimits(kl_mean=3.0) for name in VARIANTS if name != "fp32"}
    export_onnx(pruned, folder, VARIANTS, ExportOptions(limits=loose, n_threads=1))
    return folder


def test_a_graph_is_judged_as_its_checkpoint_is(pruned: Path, graphs: Path) -> None:
    """Its cache cannot be rewound, so each continuation reads its context again."""
    records = {one["quant"]: one for one in json.loads((graphs / "export.json").read_text())["exports"]}
    assert records["fp16"]["parity"]["kl_mean"] < 1e-3
    assert records["int8"]["parity"]["kl_mean"] < 0.1
    assert any("something else in the place of attention" in said for said in records["fp32"]["warnings"])
    ours = TorchLanguageModel(load_model(pruned))
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


def test_a_folder_is_measured(graphs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = "onnxruntime-genai"
    size = ["-p", "16", "-n", "4", "-d", "8", "-r", "1", "-t", "1", "--no-text-check"]
    assert main(["bench", str(graphs / "int8"), "--engine", engine, *size, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["workload"] for row in rows} >= {"pp", "tg"}
