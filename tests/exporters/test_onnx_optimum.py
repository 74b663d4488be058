"""optimum's ORTModelForCausalLM loads an exported folder as it stands and says what torch says.

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

import pytest
import torch

from cfsp.checkpoint import load_pruned
from exporters.onnx import export_onnx

pytestmark = pytest.mark.slow

PROMPT = list(range(40, 60))
SCRIPT = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM

model = ORTModelForCausalLM.from_pretrained(sys.argv[1], subfolder="onnx", file_name="model.onnx", use_cache=True)
ids = torch.tensor([json.loads(sys.argv[2])])
answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, min_new_tokens=32, do_sample=False)
print(json.dumps(answer[0].tolist()))
"""


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_optimum_generates_torchs_tokens(
    model_type: str,
    make_checkpoint: Callable[..., Path],
    packages_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    packages = [
        packages_folder("optimum-onnx", "--no-deps", "optimum-onnx~=0.1.0", "optimum~=2.1.0"),
        packages_folder("transformers-4", "transformers>=4.57,<4.58"),
    ]
    checkpoint = make_checkpoint(model_type, widths=(96, 64, 128, 40))
    export_onnx(checkpoint, tmp_path / "out", ["fp32"], n_threads=1)
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(map(str, packages))}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "out" / "fp32"), json.dumps(PROMPT)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        expected = load_pruned(checkpoint).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, min_new_tokens=32, do_sample=False
        )
    assert json.loads(done.stdout.splitlines()[-1]) == expected[0].tolist()
