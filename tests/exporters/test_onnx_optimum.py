"""optimum: its ORTModelForCausalLM loads exported folders as they stand, its exporter makes the portable graph.

optimum's ONNX part needs an older transformers than this environment may have, so it runs in a process of its own,
with both put before this environment's packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from cfsp.models.checkpoint import load_pruned
from exporters.family import ExportOptions
from exporters.onnx.export import export_onnx
from exporters.onnx.folder import find_graph
from exporters.onnx.runtime import open_model

pytestmark = pytest.mark.everything

PROMPTS = [list(range(40, 60)), list(range(70, 78))]
WIDTHS = (96, 64, 128, 40)
SCRIPT = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM

folder, rows, pad = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = ORTModelForCausalLM.from_pretrained(folder, subfolder="onnx", file_name="model.onnx", use_cache=True)
length = max(map(len, rows))
ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
answers = model.generate(ids, attention_mask=mask, max_new_tokens=32, min_new_tokens=32, do_sample=False)
print(json.dumps(answers[:, length:].tolist()))
"""

Run = Callable[..., str]


@pytest.fixture(scope="module")
def with_optimum(packages_folder: Callable[..., Path]) -> Run:
    """`with_optimum(*words)` runs this Python with optimum's packages; returns what it printed."""
    packages = [
        packages_folder("optimum-onnx", "--no-deps", "optimum-onnx~=0.1.0", "optimum~=2.1.0"),
        packages_folder("transformers-4", "transformers>=4.57,<4.58"),
    ]
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(map(str, packages))}

    def run(*words: object) -> str:
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def answers(run: Run, folder: Path, rows: list[list[int]], pad: int) -> Any:
    return json.loads(run("-c", SCRIPT, folder, json.dumps(rows), pad).splitlines()[-1])


def torchs_answer(checkpoint: Path, row: list[int]) -> list[int]:
    ids = torch.tensor([row])
    model = load_pruned(checkpoint)
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, min_new_tokens=32, do_sample=False
        )
    found: list[int] = output[0, len(row) :].tolist()
    return found


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_optimum_generates_torchs_tokens(
    model_type: str, make_checkpoint: Callable[..., Path], with_optimum: Run, tmp_path: Path
) -> None:
    fewer = dict.fromkeys(range(4), (1,)) if model_type == "llama" else {}
    checkpoint = make_checkpoint(model_type, widths=WIDTHS, groups=fewer)
    export_onnx(checkpoint, tmp_path / "out", ["fp32"], ExportOptions(n_threads=1))
    found = answers(with_optimum, tmp_path / "out" / "fp32", PROMPTS[:1], 2)
    assert found == [torchs_answer(checkpoint, PROMPTS[0])]


@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("qwen2", False)])
def test_the_portable_graph_is_standard_onnx_and_takes_rows_that_begin_with_padding(
    model_type: str, tied: bool, make_checkpoint: Callable[..., Path], with_optimum: Run, tmp_path: Path
) -> None:
    checkpoint, output = make_checkpoint(model_type, tied, widths=WIDTHS), tmp_path / "out"
    with_optimum(
        "-m", "phoneready", "quantize", checkpoint, "--to", "portable,fp32", "-o", output, "--text", "none"
    )
    path = find_graph(str(output / "portable"), last_logits=True)
    graph = ir.load(path).graph
    assert {node.domain for node in graph} == {""}
    large = [
        v for v in graph.initializers.values() if v.const_value is not None and v.const_value.size >= 384 * 64
    ]
    assert len(large) == (1 if tied else 2)
    logits = []
    for variant in ("portable", "fp32"):
        model = open_model(find_graph(str(output / variant)), n_ctx=64, n_threads=1)
        logits.append(np.concatenate([model.decode(PROMPTS[0][:7]), model.decode(PROMPTS[0][7:])]))
        model.close()
    np.testing.assert_allclose(*logits, atol=2e-3)
    found = answers(with_optimum, output / "portable", PROMPTS, 2)
    assert found == [torchs_answer(checkpoint, row) for row in PROMPTS]
