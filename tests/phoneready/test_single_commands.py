"""The commands that a report prints do what the release did."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from cfsp.files import sha256_file
from phoneready.main import main

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

TinyPath = Callable[..., Path]
CONFIG = """
seed = 3
[model]
reference = "{model}"
[prune]
{amount}
nsamples = 4
seqlen = 32
strength = 0.5
[recover]
data = ["builtin:python-docs"]
loss = "both"
max_tokens = 512
seqlen = 32
batch_size = 2
patience = 1
[evaluate]
chats = []
seqlen = 32
max_windows = 1
max_new_tokens = 2
prompts = ["List three fruits.", "What's 2+2?"]
[export]
{export}
[bench]
n_prompt = [4]
n_gen = []
ttft = []
n_threads = [1]
repetitions = 1
check_text = false
"""


@pytest.mark.parametrize(
    ("amount", "export"),
    [
        ("prune_ratio = 0.25", 'quants = ["Q8_0"]\nonnx = ["int8"]'),
        pytest.param(
            'prune_ratio = 0.25\nfor_quant = ["Q4_0"]\nblocks = 1\nattentions = 1',
            'quants = ["Q4_0"]\nonnx = ["int4"]\nimatrix = false\nrounding_windows = 2',
            marks=pytest.mark.everything,
        ),
    ],
)
def test_the_commands_make_the_releases_model_files_byte_for_byte(
    amount: str,
    export: str,
    sure_folder: TinyPath,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "release.toml"
    model = sure_folder(intermediate_size=256, num_hidden_layers=8)
    config.write_text(CONFIG.format(model=model, amount=amount, export=export), encoding="utf-8")
    assert main(["release", str(config), "-o", "out", "--threads", "1"]) == 0, capsys.readouterr().err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    commands = [shlex.split(line)[1:] for line in manifest["commands"]]
    assert [command[0] for command in commands] == ["prune", "recover", "eval", "export"]
    for command in commands:
        capsys.readouterr()
        status = main([*command, "--json"])
        # Training that gains nothing leaves what it began with, and says so by its status.
        assert status == 0 or (status == 1 and command[0] == "recover"), capsys.readouterr().err
        if command[0] == "eval":
            judged = json.loads(capsys.readouterr().out)
    released = json.loads((tmp_path / "out/stages/evaluate/evaluation.json").read_text(encoding="utf-8"))
    for figure in ("texts", "prompts", "answers", "against_answers", "seed"):
        assert judged[figure] == released[figure]
    gguf, onnx = (file["file"] for file in manifest["files"] if file["role"] == "pruned")
    assert sha256_file(tmp_path / "exports" / "gguf" / gguf) == sha256_file(tmp_path / "out" / gguf)
    graphs = sorted((tmp_path / "out" / onnx / "onnx").iterdir())
    assert len(graphs) == 3
    (variant,) = (tmp_path / "exports" / "onnx").glob("int*")
    for graph in graphs:
        assert sha256_file(variant / "onnx" / graph.name) == sha256_file(graph)
