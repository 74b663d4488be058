"""transformers.js, in Node, loads exported folders as they stand and says what ONNX Runtime says here."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from cfsp.models.reference import load_tokenizer
from exporters.onnx.language_model import OnnxLanguageModel

JAVASCRIPT = Path(__file__).resolve().parents[1] / "javascript"
DTYPES = {"fp32": "fp32", "int8": "q8", "int8-dynamic": "int8", "int4": "q4"}
PROMPT = "List three fruits."


@pytest.fixture(scope="module")
def node() -> str:
    found = shutil.which("node")
    if found is None or not (JAVASCRIPT / "node_modules" / ".installed").is_file():
        pytest.skip("Node.js or its packages are not installed; `make javascript` installs the packages")
    return found


@pytest.mark.parametrize("variant", DTYPES)
def test_transformers_js_generates_the_same_tokens(node: str, browser_export: Path, variant: str) -> None:
    command = [node, "generate.mjs", str(browser_export), variant, DTYPES[variant], PROMPT, "16"]
    done = subprocess.run(command, cwd=JAVASCRIPT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    tokenizer = load_tokenizer(browser_export / variant)
    messages = [{"role": "user", "content": PROMPT}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert found["prompt"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    model = OnnxLanguageModel(str(browser_export / variant), n_threads=1)
    (expected,) = model.generate([found["prompt"]], 16)
    model.close()
    # Where the model ends its answer, transformers.js keeps the token that says so.
    assert found["answer"][: len(expected)] == expected
    assert len(found["answer"]) - len(expected) in (0, 1)
