"""The real Gemma 3 270M, 240 MB to fetch: `make test` leaves it out, `pytest -m real tests/exporters` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

from cfsp.models.gguf_file import read_gguf
from cfsp.models.reference import load_model
from cfsp.models.source import LoadedModel
from cfsp.text.settings import BUILTIN_TEXT
from exporters.gguf import runtime
from phoneready.main import main

pytestmark = pytest.mark.real
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def gemma() -> LoadedModel:
    return load_model("gemma3-270m")


def test_it_says_what_llama_cpp_says(gemma: LoadedModel) -> None:
    path = Path(gemma.source.path or "")
    ids = gemma.tokenizer(PROMPT)["input_ids"]
    with runtime.open_model(path, runtime.Context(n_ctx=64, cache_type="f32")) as model:
        assert model.tokenize(PROMPT, add_special=True) == ids
        expected = model.generate(ids, 12)
    answer = gemma.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert answer[0, len(ids) :].tolist() == expected
    assert " capital" in gemma.tokenizer.decode(expected)


def test_a_quarter_of_its_tokens_make_half_of_its_file(gemma: LoadedModel, tmp_path: Path) -> None:
    command = [
        "prune",
        "gemma3-270m",
        "-o",
        str(tmp_path / "small"),
        "--vocabulary",
        "65536",
        "--prune-ratio",
        "0",
    ]
    text = ["--calibration", BUILTIN_TEXT, "--nsamples", "4", "--seqlen", "256"]
    assert main([*command, *text]) == 0
    for name, model in (("dense", "gemma3-270m"), ("trimmed", str(tmp_path / "small"))):
        assert main(["export", model, "-o", str(tmp_path / name), "--gguf", "Q8_0"]) == 0
    dense, small = (next((tmp_path / name).glob("*.gguf")) for name in ("dense", "trimmed"))
    assert small.stat().st_size < 0.6 * dense.stat().st_size
    assert len(read_gguf(small).require("tokenizer.ggml.tokens")) == 65536
