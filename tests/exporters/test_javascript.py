"""transformers.js in Node, and onnxruntime-web in headless Chromium, load exported folders as they stand."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfsp.models.reference import load_tokenizer
from exporters.export_record import ParityLimits
from exporters.family import ExportOptions
from exporters.onnx.export import export_onnx
from exporters.onnx.folder import find_graph
from exporters.onnx.language_model import OnnxLanguageModel
from exporters.onnx.runtime import open_model
from exporters.onnx.variants import VARIANTS

JAVASCRIPT = Path(__file__).resolve().parents[1] / "javascript"
LIMITS = {"fp32": 1e-3, "int8-dynamic": 1e-3, "int8": 0.25, "int4": 0.25}
"""Most that a logit may differ, in standard deviations of a row: MatMulNBits rounds activations in its own way."""
DTYPES = {"fp32": "fp32", "int8": "q8", "int8-dynamic": "int8", "int4": "q4"}
PROMPT, COUNT = [5, 17, 300, 42, 9], 16


@pytest.fixture(
    scope="module",
    params=[
        {"model_type": "llama", "silent": (2,), "groups": {1: (0,)}},
        {"model_type": "lfm2"},
        {"model_type": "qwen3_5_text"},
    ],
    ids=lambda asked: asked["model_type"],
)
def folders(
    request: pytest.FixtureRequest,
    make_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The variants that JavaScript's runtimes load; some blocks have fewer heads, or none and something else."""
    output = tmp_path_factory.mktemp("onnx") / "out"
    # Next-token distributions of random weights are nearly flat, so quantization moves them far.
    options = ExportOptions(limits=dict.fromkeys(LIMITS, ParityLimits(kl_mean=3.0)), n_threads=1)
    export_onnx(make_checkpoint(widths=(96, 64, 128, 40), **request.param), output, tuple(LIMITS), options)
    return output


@pytest.fixture(scope="module")
def node() -> str:
    found = shutil.which("node")
    if found is None or not (JAVASCRIPT / "node_modules" / ".installed").is_file():
        pytest.skip("Node.js or its packages are not installed; `make javascript` installs the packages")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("Chromium is not installed")
    if not (JAVASCRIPT / "node_modules" / ".installed").is_file():
        pytest.skip("onnxruntime-web is not installed; `make javascript` installs it")
    with playwright.sync_playwright() as session:
        chromium = session.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def generated(folder: Path, prompt: list[int]) -> list[int]:
    model = OnnxLanguageModel(str(folder), n_threads=1)
    (expected,) = model.generate([prompt], COUNT)
    model.close()
    return expected


@pytest.mark.parametrize("variant", LIMITS)
def test_transformers_js_generates_the_same_tokens(node: str, folders: Path, variant: str) -> None:
    text = "List three fruits."
    command = [node, "generate.mjs", str(folders), variant, DTYPES[variant], text, str(COUNT)]
    done = subprocess.run(command, cwd=JAVASCRIPT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    tokenizer = load_tokenizer(folders / variant)
    chat = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert found["prompt"] == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    expected = generated(folders / variant, found["prompt"])
    # Where the model ends its answer, transformers.js keeps the token that says so.
    assert found["answer"][: len(expected)] == expected
    assert len(found["answer"]) - len(expected) in (0, 1)


class Handler(http.server.SimpleHTTPRequestHandler):
    """The page and its packages, and under /model/ a variant; isolated, as threads in a page ask for."""

    model: Path

    def translate_path(self, path: str) -> str:
        if path.startswith("/model/"):
            return str(self.model / path.removeprefix("/model/"))
        return super().translate_path(path)

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.mark.parametrize("variant", LIMITS)
def test_a_page_generates_the_same_tokens(browser: Any, folders: Path, variant: str) -> None:
    handler = type("VariantHandler", (Handler,), {"model": folders / variant})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(JAVASCRIPT)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page, problems = browser.new_page(), []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    try:
        page.goto(f"http://127.0.0.1:{server.server_port}/browser.html")
        page.wait_for_function("() => Boolean(window.generate)")
        arguments = [VARIANTS[variant].stem, PROMPT, COUNT]
        found = page.evaluate("([stem, prompt, count]) => generate(stem, prompt, count)", arguments)
    finally:
        page.close()
        server.shutdown()
        server.server_close()
    assert problems == []
    assert found["isolated"]
    with_cache = open_model(find_graph(str(folders / variant)), n_ctx=64, n_threads=1)
    logits = with_cache.decode(PROMPT)[-1]
    with_cache.close()
    assert np.abs(np.array(found["logits"]) - logits).max() / logits.std() < LIMITS[variant]
    expected = generated(folders / variant, PROMPT)  # the page does not stop where an answer ends
    assert expected
    if LIMITS[variant] < 0.01:
        assert found["tokens"][: len(expected)] == expected
